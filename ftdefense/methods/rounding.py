"""Round-to-nearest quantisation: weights on a grid of few values per group.

NF4 is of Dettmers et al. 2023, arXiv:2305.14314: quantiles of a normal distribution,
the largest at 1, with 0 among them.
"""

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree

FORMATS = ("int8", "int4", "nf4")
# Probability of the largest quantile: between those of 15 and of 16 even steps.
_OFFSET = 0.5 * (29 / 30 + 31 / 32)


def normal_float() -> jax.Array:
    """The sixteen values of NF4, ascending."""
    above = jax.scipy.special.ndtri(jnp.linspace(_OFFSET, 0.5, 9)[:-1])
    below = -jax.scipy.special.ndtri(jnp.linspace(_OFFSET, 0.5, 8)[:-1])
    values = jnp.sort(jnp.concatenate([below, jnp.zeros(1), above]))
    return values / jnp.max(values)


def codes(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """(codes, scale) of groups along the last axis: absmax, symmetric, half to even.

    `codes * scale` is nearest to x on the group's grid; for NF4 the codes are the grid's
    values themselves.
    """
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if kind == "nf4":
        scale = jnp.where(most > 0, most, 1)
        grid = normal_float().astype(x.dtype)
        middles = (grid[1:] + grid[:-1]) / 2
        return grid[jnp.searchsorted(middles, x / scale)], scale
    if kind not in FORMATS:
        raise errors.unknown("quantisation", kind, FORMATS)
    levels = {"int8": 127, "int4": 7}[kind]
    scale = jnp.where(most > 0, most, 1) / levels
    return jnp.clip(jnp.round(x / scale), -levels, levels), scale


def rounded(kernel: jax.Array, kind: str, group: int) -> jax.Array:
    """A kernel [..., inputs, outputs] on the grid of each output, or of its groups.

    Raises:
      UserError: if the inputs do not split in groups of `group` (0: one group).
    """
    wide = jnp.swapaxes(tree.wide(kernel), -1, -2)
    size = group or wide.shape[-1]
    if wide.shape[-1] % size:
        raise errors.UserError(
            f"group={group} does not divide the {wide.shape[-1]} inputs of a kernel."
        )
    parts = wide.reshape(*wide.shape[:-1], -1, size)
    found, scale = codes(parts, kind)
    near = (found * scale).reshape(wide.shape)
    return jnp.swapaxes(near, -1, -2).astype(kernel.dtype)
