"""What a batch gives, evaluated in parts at the memory of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types


def summed(
    compute: Callable[[Any, types.Rng | None], Any],
    batch: Any,
    parts: int = 1,
    rng: types.Rng | None = None,
) -> Any:
    """`compute(batch, rng)`, a tree of sums over rows, as a sum over `parts` parts.

    Leaves of `batch` are [B, ...]; parts have B / parts rows each, and are recomputed
    in the backward pass. What `compute` averages over rows comes out `parts` times.
    """
    if parts == 1:
        return compute(batch, rng)
    found = _mapped(compute, batch, parts, rng)
    return jax.tree.map(lambda x: jnp.sum(x, 0), found)


def stacked(
    compute: Callable[[Any, types.Rng | None], Any],
    batch: Any,
    parts: int = 1,
    rng: types.Rng | None = None,
) -> Any:
    """`compute(batch, rng)`, a tree of arrays [B, ...], evaluated in `parts` parts."""
    if parts == 1:
        return compute(batch, rng)
    found = _mapped(compute, batch, parts, rng)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _mapped(compute, batch, parts, rng):
    """[parts, ...] each."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise errors.UserError(
            f"a batch of {rows} rows does not split in {parts} parts; set microbatches "
            "to a divisor of it."
        )
    split = jax.tree.map(lambda x: x.reshape(parts, rows // parts, *x.shape[1:]), batch)
    rngs = None if rng is None else jax.random.split(rng, parts)
    run = jax.checkpoint(lambda xs: compute(*xs))
    return jax.lax.map(run, (split, rngs))
