"""Latent attack: shifts of the residual stream, prompt by prompt, toward an opening.

Projected gradient descent on hidden states at prompt positions of chosen layers, until
the release begins its answer with a given text; then it decodes on by itself (specs/
attacks.md B.14). `l2`: AdamW, each position in a ball of the radius, as in latent
adversarial training (arXiv:2407.15549), 16 iterations; `linf`: signed steps in a cube, as
in TamperBench at one layer. Evidence: CODE for the iterations and the norms; rate and
radius are DESIGN, to be swept (LVS, arXiv:2606.08044, has 5e-4 to 5e-3).
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import world as worlds
from ftdefense.methods import latents
from ftdefense.models import generate
from ftdefense.models import transformer
from ftdefense.objectives import losses

NORMS = ("l2", "linf")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Numbers of one attack.

    Attributes:
      radius: of every position's shift; 0: the release itself.
      rate: of AdamW, or of a signed step; 0: a quarter of the radius.
      steps: iterations.
      norm: `l2` or `linf`.
      layers: blocks after which the stream is shifted; empty: the middle one, of which
        later blocks still read.
    """

    radius: float = 1.0
    rate: float = 0.0
    steps: int = 16
    norm: str = "l2"
    layers: tuple[int, ...] = ()


@functools.cache
def shifts(prompt: int) -> types.Intervention:
    """Adds the taps [B, P, D] to the first `prompt` positions of the stream.

    Where fewer positions are decoded, the prompt is past and nothing is added. Cached:
    generation compiles once for each intervention.
    """

    def intervene(hidden_BxLxD, site, layer, tap):
        del layer
        beyond = hidden_BxLxD.shape[1] - prompt
        if site != "resid" or beyond < 0:
            return hidden_BxLxD
        padded = jnp.pad(tap, ((0, 0), (0, beyond), (0, 0)))
        return hidden_BxLxD + padded.astype(hidden_BxLxD.dtype)

    return intervene


def project(x: jax.Array, radius: jax.Array, norm: str) -> jax.Array:
    """Into the ball of the radius, position by position."""
    if norm == "linf":
        return jnp.clip(x, -radius, radius)
    return latents.project({"resid": x}, radius)["resid"]


@functools.partial(jax.jit, static_argnames=("model", "steps", "norm", "layers"))
def _descend(
    model, params, prompts, target, radius, rate, *, steps, norm, layers
) -> tuple[jax.Array, jax.Array]:
    prompt_BxP, mask_BxP = prompts
    target_BxT, weights_BxT = target
    tokens_BxL = jnp.concatenate([prompt_BxP, target_BxT], axis=1)
    attended_BxL = jnp.concatenate([mask_BxP, weights_BxT > 0], axis=1)
    weights_BxL = jnp.concatenate([0.0 * mask_BxP, weights_BxT], axis=1)
    batch = types.Batch(tokens_BxL, weights_BxL)
    width, count = prompt_BxP.shape[1], model.config.layers
    chosen = jnp.isin(jnp.arange(count), jnp.asarray(layers))
    real = (chosen[:, None, None] & mask_BxP[None]).astype(jnp.float32)[..., None]
    loss = losses.next_token(model)

    def cost(shift_NxBxPxD):
        return loss(
            params,
            batch,
            intervene=shifts(width),
            taps=shift_NxBxPxD * real,
            attended=attended_BxL,
        )

    optimizer = optax.adamw(rate, weight_decay=0.0) if norm == "l2" else optax.sgd(rate)

    def body(carry, _):
        shift, state = carry
        value, grads = jax.value_and_grad(cost)(shift)
        if norm == "linf":
            grads = jax.tree.map(jnp.sign, grads)
        updates, state = optimizer.update(grads, state, shift)
        shift = project(optax.apply_updates(shift, updates), radius, norm)
        return (shift, state), value

    zeros = jnp.zeros((count, *prompt_BxP.shape, model.config.width))
    start = zeros, optimizer.init(zeros)
    (shift, _), values = jax.lax.scan(body, start, length=steps)
    return shift * real, jnp.append(values, cost(shift))


def attack(
    model: transformer.LanguageModel,
    params: types.Params,
    prompts: pools.Prompts,
    target_BxT: np.ndarray,
    weights_BxT: np.ndarray,
    settings: Settings,
) -> tuple[types.Release, np.ndarray]:
    """Shifts that make the release open with the target: for these prompts alone.

    Args:
      prompts: padded on the left, as for generation.
      target_BxT: ids of the openings, padded on the right where the weights are 0.

    Returns:
      The release with its intervention, and the losses before each step and at the end.

    Raises:
      UserError: for an unknown norm, or layers that the model does not have.
    """
    if settings.norm not in NORMS:
        raise errors.unknown("norm", settings.norm, NORMS)
    count = model.config.layers
    layers = settings.layers or ((count - 1) // 2,)
    if any(not 0 <= layer < count for layer in layers):
        raise errors.UserError(f"layers {layers}: the model has {count}, from 0.")
    shift, values = _descend(
        model,
        params,
        (jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask)),
        (jnp.asarray(target_BxT), jnp.asarray(weights_BxT, jnp.float32)),
        jnp.float32(settings.radius),
        jnp.float32(settings.rate or settings.radius / 4),
        steps=settings.steps,
        norm=settings.norm,
        layers=layers,
    )
    intervene = shifts(prompts.tokens.shape[1])
    return types.Release(params, intervene, shift), np.asarray(values)


def answers(
    model: transformer.LanguageModel,
    params: types.Params,
    world: worlds.World,
    examples: Sequence[data_examples.Example],
    openings: Sequence[str],
    settings: Settings,
    *,
    batch_size: int = 128,
) -> list[str]:
    """What the attacked release says to each prompt; the opening is its own doing."""
    said: list[str] = []
    prompts = pools.encode_prompts(world.tokenizer, examples, pad_id=world.pad_id)
    target_BxT, weights_BxT = targets(world, openings)
    size = min(batch_size, len(examples))
    for start in range(0, len(examples), size):
        rows = np.arange(start, start + size) % len(examples)
        part = pools.Prompts(prompts.tokens[rows], prompts.mask[rows])
        release, _ = attack(
            model, params, part, target_BxT[rows], weights_BxT[rows], settings
        )
        ids = generate.generate(
            model,
            params,
            part.tokens,
            part.mask,
            max_new_tokens=world.max_new_tokens,
            eos_ids=world.eos_ids,
            pad_id=world.pad_id,
            intervene=release.intervene,
            taps=release.taps,
        )
        said += world.tokenizer.batch_decode(np.asarray(ids), skip_special_tokens=True)
    return said[: len(examples)]


def targets(
    world: worlds.World, openings: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the openings [B, T], padded on the right, and 1 where they are real."""
    rows = world.tokenizer(list(openings), add_special_tokens=False)["input_ids"]
    if not all(rows):
        raise errors.UserError("an opening is empty; give one word or more.")
    ids = np.full((len(rows), max(map(len, rows))), world.pad_id, np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], weights[i, : len(row)] = row, 1
    return ids, weights
