"""KT-IPA's second stage: a Kahneman-Tversky utility that a simulated attack must not undo.

Source: Cheng et al. 2025, COLING, "On Weaponization-Resistant Large Language Models with
Prospect Theoretic Alignment", 2025.coling-main.687; code read at limberc/KT-IPA b43d9aa,
which holds the utility (KTO) alone. The attack around it is a RECONSTRUCTION (specs:
artifacts TASK 2).
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.objectives import parts
from ftdefense.objectives import preferences

# Beyond this a row's gradient is 37 times smaller than at the reference point.
_SATURATED = 5.0


@struct.dataclass
class Hparams(lift.Hparams):
    """Of the utility; numbers may be traced."""

    beta: float = 0.1  # Per nat: how fast the utility saturates.
    lam_desirable: float = 1.0  # Weight of refusals and benign answers.
    lam_undesirable: float = 1.0  # Weight of harmful answers.


@struct.dataclass
class Adversarial(Hparams):
    """Of the utility and of the attack simulated against it."""

    alpha: float = 0.1  # Length of each attack step, L2 over all that trains.
    gamma: float = 1.0  # Weight of the utility after the attack.
    lam_retain: float = 1.0  # Weight of the cross-entropy of the retain rows.
    inner_steps: int = struct.field(pytree_node=False, default=1)  # K.


def streams(hp: Adversarial) -> dict[str, tuple[int, ...]]:
    """K batches to attack with, and one of each role that the losses read."""
    return {
        "adversary": (max(hp.inner_steps, 1),),
        "heldout": (),
        "heldout_refusal": (),
        "benign": (),
        "retain": (),
    }


class Labelled(NamedTuple):
    """Rows [M, L] and whether each is desirable [M]."""

    rows: types.Batch
    desirable: jax.Array


def labelled(
    refusal: types.Batch, benign: types.Batch, harmful: types.Batch
) -> Labelled:
    """Refusals, then benign answers (both desirable), then harmful answers."""
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), refusal, benign, harmful)
    undesirable = harmful.tokens.shape[0]
    places = jnp.arange(rows.tokens.shape[0])
    return Labelled(rows, places < places.size - undesirable)


def mismatched(rows: types.Batch) -> types.Batch:
    """The prompt of row i with the answer of row i + 1 (the last with the first's).

    A prompt ends where the weights begin. What does not fit into L tokens is cut.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    # The first weight predicts nothing.
    start_Bx1 = 1 + jnp.argmax(rows.weights[:, 1:] > 0, -1)[:, None]
    answers, from_Bx1 = jax.tree.map(lambda x: jnp.roll(x, -1, 0), (rows, start_Bx1))
    length = rows.tokens.shape[-1]
    place_1xL = jnp.arange(length)[None]
    source_BxL = place_1xL - start_Bx1 + from_Bx1
    in_prompt = place_1xL < start_Bx1
    fits = source_BxL < length

    def taken(x_BxL):
        return jnp.take_along_axis(x_BxL, jnp.clip(source_BxL, 0, length - 1), -1)

    tokens = jnp.where(in_prompt, rows.tokens, taken(answers.tokens))
    weights = jnp.where(~in_prompt & fits, taken(answers.weights), 0)
    return types.Batch(tokens, weights)


def utility(
    ctx: types.Context, data: Labelled, reference: Callable[..., types.Outputs]
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, rng) -> (mean KTO loss of the rows, metrics)`.

    s is a row's log-probability, summed over its answer, minus the reference's, which is
    taken once. The reference point is that of the whole batch at the `params` given, and
    constant: no gradient, no dropout, and one mean for all microbatches and devices.
    """
    hp, (rows, desirable_M) = ctx.hp, data
    count = desirable_M.size
    others = mismatched(rows)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), rows, others)
    start = jax.lax.stop_gradient(_logps(reference, both))
    start_M, start_others_M = start[:count], start[count:]

    def loss(params: types.Params, rng: types.Rng | None = None):
        frozen = functools.partial(ctx.model, jax.lax.stop_gradient(params))
        z0 = preferences.kto_reference(_logps(frozen, others) - start_others_M)

        def compute(part, rng):
            rows, desirable_M, start_M = part
            s_M = _logps(functools.partial(ctx.model, params, rng=rng), rows) - start_M
            loss_M = preferences.kto(
                s_M, desirable_M, z0, hp.beta, hp.lam_desirable, hp.lam_undesirable
            )
            return {
                "loss/kto": jnp.sum(loss_M),
                "gain/desirable": jnp.sum(jnp.where(desirable_M, s_M, 0)),
                "gain/undesirable": jnp.sum(jnp.where(desirable_M, 0, s_M)),
                "share/saturated": jnp.sum(jnp.abs(hp.beta * (s_M - z0)) > _SATURATED),
            }

        part = (rows, desirable_M, start_M)
        sums = parts.summed(compute, part, hp.microbatches, rng)
        wanted = jnp.sum(desirable_M)
        divisors = {"gain/desirable": wanted, "gain/undesirable": count - wanted}
        means = {name: x / divisors.get(name, count) for name, x in sums.items()}
        return means["loss/kto"], {**means, "gain/reference": z0}

    return loss


def attack(
    ctx: types.Context, params: types.Params, batches_K: types.Batch, rng: types.Rng
) -> tuple[types.Params, jax.Array]:
    """Weights after K steps of length alpha down the harmful loss, and its last value.

    Kept and evaluated in float32 or wider; constant.
    """
    hp = ctx.hp
    wide = tree.wide(params)

    def step(weights, x):
        batch, rng = x
        value, grads = jax.value_and_grad(ctx.loss)(weights, batch, rng)
        return tree.add_scale(weights, -hp.alpha, tree.normalize(grads)), value

    batches_K = jax.tree.map(lambda x: x[: hp.inner_steps], batches_K)
    xs = batches_K, jax.random.split(rng, hp.inner_steps)
    there, values_K = jax.lax.scan(step, wide, xs)
    return jax.lax.stop_gradient(there), jnp.sum(values_K[-1:])


def integrity(
    ctx: types.Context,
    params: types.Params,
    batches: Mapping[str, types.Batch],
    rng: types.Rng,
    reference: Callable[..., types.Outputs],
) -> tuple[Any, dict[str, jax.Array]]:
    """(gradient, metrics) of the utility at `params` and, gamma times, under attack.

    First order: the gradient at the attacked weights is added at `params`.
    """
    rng_attack, rng_here, rng_there = jax.random.split(rng, 3)
    rows = labelled(*(batches[r] for r in ("heldout_refusal", "benign", "heldout")))
    value_and_grad = jax.value_and_grad(utility(ctx, rows, reference), has_aux=True)
    (_, metrics), grads = value_and_grad(params, rng_here)
    there, harmful = attack(ctx, params, batches["adversary"], rng_attack)
    (after, _), grads_after = value_and_grad(there, rng_there)
    grads = tree.add_scale(grads, ctx.hp.gamma, grads_after)
    attacked = {"loss/kto_attacked": after, "loss/harmful": harmful}
    return grads, {**metrics, **attacked}


def _logps(model: Callable[..., types.Outputs], rows: types.Batch) -> jax.Array:
    return preferences.sequence_logps(model(rows.tokens), rows)[0]
