"""Flat draws are the draws of `jax.random`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import draws

SHAPES = [(), (7,), (2, 3, 5), (1, 4, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_those_of_jax_to_the_bit(shape):
    """Catches a draw laid out column by column (`order="F"`), a lost bound or dtype, and
    a JAX that no longer numbers entries by their flat index.
    """
    rng = jax.random.key(3)
    pairs = [
        (draws.normal(rng, shape), jax.random.normal(rng, shape)),
        (
            draws.normal(rng, shape, jnp.bfloat16),
            jax.random.normal(rng, shape, jnp.bfloat16),
        ),
        (
            draws.uniform(rng, shape, jnp.float32, -0.5, 2),
            jax.random.uniform(rng, shape, jnp.float32, -0.5, 2),
        ),
        (draws.bernoulli(rng, 0.3, shape), jax.random.bernoulli(rng, 0.3, shape)),
    ]
    for ours, theirs in pairs:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_array_equal(ours, theirs)


def test_equal_those_of_jax_under_vmap():
    """Catches keys of members that are mixed by the reshape."""
    rngs = jax.random.split(jax.random.key(0), 3)
    ours = jax.vmap(lambda rng: draws.uniform(rng, (2, 5)))(rngs)
    each = [jax.random.uniform(rng, (2, 5)) for rng in rngs]
    np.testing.assert_array_equal(ours, each)
