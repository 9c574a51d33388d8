"""Hidden states of all layers, and how far they have moved from another model's."""

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.objectives import distances
from ftdefense.objectives import lens
from ftdefense.objectives import losses
from ftdefense.objectives import parts

# Two compilations of one forward pass differ by a few roundings of float32. Closer than
# this, relative to the state, two states are the same: no direction leads apart.
_ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)


def distance(outputs: types.Outputs, reference: types.Outputs) -> jax.Array:
    """Mean over layers and all positions of `||h - h_reference||`: not squared.

    No gradient passes through `reference`; where the two agree the gradient is zero.
    """
    wide = jnp.promote_types(outputs.hidden["final"].dtype, jnp.float32)
    here_NxBxLxD = lens.hidden_states(outputs).astype(wide)
    there_NxBxLxD = jax.lax.stop_gradient(lens.hidden_states(reference)).astype(wide)
    square = jnp.sum(jnp.square(here_NxBxLxD - there_NxBxLxD), -1)
    floor = jnp.square(_ROUNDING) * jnp.sum(jnp.square(there_NxBxLxD), -1)
    apart = square > floor
    return jnp.mean(jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0))


def retained(
    ctx: types.Context,
    params: types.Params,
    batch: types.Batch,
    rng: types.Rng | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(next-token loss, distance from the stage's start), of one forward pass of each."""

    def compute(batch, rng):
        seen = distances.attended(batch)
        outputs = ctx.model(params, batch.tokens, rng=rng, attended=seen)
        moved = distance(outputs, ctx.reference(batch.tokens, attended=seen))
        return *losses.weighted_sums(outputs, batch), moved

    count = ctx.hp.microbatches
    total, weight, moved = parts.summed(compute, batch, count, rng)
    return losses.average(total, weight), moved / count
