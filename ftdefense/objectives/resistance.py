"""What a safeguard should still be worth after an attack: entropy, or a preference.

Source: Tamirisa et al. 2024, arXiv:2408.00761; code read at
rishub-tamirisa/tamper-resistance 19de233.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import distances
from ftdefense.objectives import parts
from ftdefense.objectives import preferences

_ROLES = {"entropy": ("heldout",), "dpo": ("heldout", "heldout_refusal")}


def roles(name: str) -> tuple[str, ...]:
    """The roles that the objective of this name is taken on."""
    if name not in _ROLES:
        raise errors.unknown("objective", name, _ROLES)
    return _ROLES[name]


def objective(
    ctx: types.Context, heldout: Mapping[str, types.Batch], name: str, beta: float
) -> Callable[..., jax.Array]:
    """`loss(params, rng)` by its name; `heldout` maps its `roles` to batches."""
    if name == "dpo":
        return dpo(ctx, heldout["heldout"], heldout["heldout_refusal"], beta)
    return entropy(ctx, heldout["heldout"])


def negative_entropy(logits_BxLxV: jax.Array) -> jax.Array:
    """Mean over all positions, padding too, of `sum_v p log p`; -ln V <= it <= 0."""
    logps_BxLxV = jax.nn.log_softmax(logits_BxLxV)
    p_BxLxV = jnp.exp(logps_BxLxV)
    return jnp.mean(jnp.sum(p_BxLxV * logps_BxLxV, -1))


def entropy(ctx: types.Context, heldout: types.Batch) -> Callable[..., jax.Array]:
    """`loss(params, rng)`: minus the mean entropy of what follows held-out text."""

    def loss(params: types.Params, rng: types.Rng) -> jax.Array:
        def compute(batch, rng):
            seen = distances.attended(batch)
            outputs = ctx.model(params, batch.tokens, rng=rng, attended=seen)
            return negative_entropy(outputs.logits)

        count = ctx.hp.microbatches
        return parts.summed(compute, heldout, count, rng) / count

    return loss


def dpo(
    ctx: types.Context, heldout: types.Batch, refusal: types.Batch, beta: float
) -> Callable[..., jax.Array]:
    """`loss(params, rng)`: mean DPO loss of refusals over the held-out answers.

    The reference is the model that the stage starts from; its log-probabilities are
    taken once.
    """
    preferences.check_pairs(refusal, heldout)
    rows = heldout.tokens.shape[0]

    def logps(model, pairs):
        # One forward pass for both answers, as the authors do: [2, rows].
        both = jax.tree.map(lambda *x: jnp.concatenate(x), *pairs)
        found, _ = preferences.sequence_logps(model(both.tokens), both)
        return found.reshape(2, -1)

    start_Bx2 = jax.lax.stop_gradient(logps(ctx.reference, (refusal, heldout))).T

    def loss(params: types.Params, rng: types.Rng) -> jax.Array:
        def compute(part, rng):
            pairs, start_Bx2 = part
            model = functools.partial(ctx.model, params, rng=rng)
            chosen_B, rejected_B = logps(model, pairs) - start_Bx2.T
            return jnp.sum(preferences.dpo(chosen_B, rejected_B, beta))

        part = ((refusal, heldout), start_Bx2)
        return parts.summed(compute, part, ctx.hp.microbatches, rng) / rows

    return loss
