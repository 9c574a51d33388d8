"""Parts of a step that run in some steps only, without a branch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDING = 1e-4  # Shares are counted in float32: a product just below 3 still makes 3.


def first(share: float | jax.Array, step: Any, steps: int) -> jax.Array:
    """Whether `step` is one of the first `floor(share * steps)`."""
    return step < jnp.floor(share * steps + ROUNDING)


def only_if(active: jax.Array, compute: Callable[[], Any]) -> Any:
    """`compute()` where `active`, else zeros of its shapes, at no cost.

    A loop of one turn or of none. Unlike a `where` it computes nothing in vain; unlike
    a `cond` it still does not under `vmap`, as long as all members agree. No gradient
    passes through it.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    turns = jnp.asarray(active).astype(jnp.int32)
    return jax.lax.fori_loop(0, turns, lambda _i, _zeros: compute(), zeros)
