"""Circuit breakers: turn the hidden states of harmful texts to where they never were.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T2 purge
Strategy     anchoring
Minimises    alpha * t / 2T * R + alpha * (1 - t / 2T) * C at step t = 1 .. T. C: mean of
             relu(cos(h_l, o_l)) over target layers and real tokens, prompts included, of
             harmful texts. R: mean of ||h_l - o_l||, not squared, over all hidden states
             and positions of retain texts, padding counting as 0. o: the model at the
             start of the stage; no gradient passes through it.
Source       Zou et al. 2024, arXiv:2406.04313; code read in the forks
             ks-fahad/CircuitBreakers and suv11235/circuit-breakers of
             GraySwanAI/circuit-breakers (specs: unlearning_and_traps 7).
Evidence     CODE, of third parties' copies. UNVERIFIED: the paper's tables.
Licence      MIT (specs: peers).
Differs      2T is twice the stage's steps: the code's 300 at its 150. No prompt is
             blanked, as half of the code's harmful ones are. The blocks that the code
             drops are computed and add nothing; their weights get no gradient. Distances
             below a rounding, and states of length 0, have gradient 0, not NaN.
             The start is a stationary point of C and R: the code leaves it by the
             rounding of bfloat16; `jitter` > 0 leaves it by noise drawn from the step's
             key, added to o in C.
Reduces to   no update at alpha = 0; nor, but for rounding, at the start if jitter = 0.
Cost         4 forwards, 2 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import draws
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import depths
from ftdefense.objectives import distances
from ftdefense.objectives import lens
from ftdefense.objectives import parts
from ftdefense.objectives import representations

STARTS_FROM = "aligned"
PUBLISHED = (10, 20)  # Hidden states, of 32 layers; see `depths.hidden_states`.
NULL = {"alpha": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    alpha: float = 10.0  # Weight of both terms together.
    jitter: float = 0.0  # Noise on what is turned away from, relative to its length.
    # Hidden states to turn; (): those published, at this depth.
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())
    # As in the code: the model ends with the block after the deepest target.
    drop: bool = struct.field(pytree_node=False, default=True)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": (), "retain": ()}


def rerouting(
    outputs: types.Outputs,
    reference: types.Outputs,
    mask_BxL: jax.Array,
    layers: tuple[int, ...],
    jitter: float | jax.Array,
    rng: types.Rng,
) -> jax.Array:
    """Sum over `layers` and tokens of `relu(cos)`."""
    at = jnp.asarray(layers)
    here_SxBxLxD = lens.hidden_states(outputs)[at]
    there_SxBxLxD = lens.hidden_states(reference)[at]
    there_SxBxLxD = tree.wide(jax.lax.stop_gradient(there_SxBxLxD))
    noise_SxBxLxD = draws.normal(rng, there_SxBxLxD.shape, there_SxBxLxD.dtype)
    scale_SxBxLx1 = (
        distances.norm(there_SxBxLxD)[..., None] * there_SxBxLxD.shape[-1] ** -0.5
    )
    there_SxBxLxD += jitter * scale_SxBxLx1 * noise_SxBxLxD
    cosine_SxBxL = distances.cosine(here_SxBxLxD, there_SxBxLxD)
    return jnp.sum(jax.nn.relu(cosine_SxBxL) * mask_BxL[None])


def masked(outputs: types.Outputs, mask_BxL: jax.Array) -> types.Outputs:
    """Hidden states, 0 where the mask is."""
    mask_BxLx1 = mask_BxL[..., None].astype(outputs.hidden["final"].dtype)
    masks = {"embed": mask_BxLx1, "resid": mask_BxLx1[None], "final": mask_BxLx1}
    hidden = {name: outputs.hidden[name] * mask for name, mask in masks.items()}
    return outputs.replace(hidden=hidden)


def direction(ctx, params, batches, rng):
    hp, both = ctx.hp, (batches["harmful"], batches["retain"])
    blocks = depths.count(ctx.reference, both[0].tokens)
    layers = depths.hidden_states(hp.layers, PUBLISHED, blocks)
    kept = layers[-1] + 1 if hp.drop else blocks
    model = depths.truncated(ctx.model, kept, blocks)
    reference = depths.truncated(ctx.reference, kept, blocks)
    tokens = len(layers) * jnp.maximum(jnp.sum(distances.attended(both[0])), 1)
    progress = (ctx.step + 1) / (2 * max(ctx.steps, 1))

    def loss(w):
        def compute(both, rng):
            harmful, retain = both
            rng_harmful, rng_retain, rng_jitter = jax.random.split(rng, 3)
            turned = rerouting(
                model(w, harmful.tokens, rng=rng_harmful),
                reference(harmful.tokens),
                distances.attended(harmful),
                layers,
                hp.jitter,
                rng_jitter,
            )
            mask_BxL = distances.attended(retain)
            moved = representations.distance(
                masked(model(w, retain.tokens, rng=rng_retain), mask_BxL),
                masked(reference(retain.tokens), mask_BxL),
            )
            return turned / tokens, moved / hp.microbatches

        turned, moved = parts.summed(compute, both, hp.microbatches, rng)
        total = hp.alpha * (progress * moved + (1 - progress) * turned)
        return total, {"cosine/harmful": turned, "distance/retain": moved}

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_CODE = Hparams(
    optimizers.Optimizer(1e-4),
    adapters.LoRA(alpha=16.0, dropout=0.05, rank=16),
)

PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX.replace(learning_rate=3e-3), jitter=1e-2),
        steps=200,
    ),
    "code": plans.Plan(
        _CODE,
        batch_size=16,
        steps=150,
        source="GraySwanAI/circuit-breakers, lorra_circuit_breaker_llama3_8b.sh, read "
        "in the fork ks-fahad/CircuitBreakers",
    ),
    "code_mistral": plans.Plan(
        _CODE.replace(alpha=5.0),
        batch_size=16,
        steps=150,
        source="as `code`; alpha of Mistral-7B from the specs, unlearning_and_traps 7",
    ),
}
