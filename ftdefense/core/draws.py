"""Random arrays, drawn flat on a CPU: the numbers of `jax.random`, sooner compiled.

JAX numbers the entries of an array by its flat index (`jax_threefry_partitionable`), so
a draw of any shape is a flat draw reshaped. XLA compiles the flat one up to ten times as
fast on a CPU: it has no index arithmetic over several axes. Elsewhere nothing is
reshaped: of a flat draw each device would hold all, where its shard is not of the first
axis.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from ftdefense.core import types


def normal(
    rng: types.Rng, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Standard normal entries."""
    return _flat(lambda shape: jax.random.normal(rng, shape, dtype), shape)


def uniform(
    rng: types.Rng,
    shape: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
    low: float | jax.Array = 0.0,
    high: float | jax.Array = 1.0,
) -> jax.Array:
    """Uniform entries in [low, high)."""
    return _flat(lambda shape: jax.random.uniform(rng, shape, dtype, low, high), shape)


def bernoulli(
    rng: types.Rng, p: float | jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """True with probability `p`, a scalar."""
    return _flat(lambda shape: jax.random.bernoulli(rng, p, shape), shape)


def _flat(
    sample: Callable[[tuple[int, ...]], jax.Array], shape: tuple[int, ...]
) -> jax.Array:
    if jax.default_backend() != "cpu":
        return sample(shape)
    return sample((math.prod(shape),)).reshape(shape)
