"""Random mapping, K8 of the specs: fixed points, scale, a random state's value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.objectives import random_mapping

TOKENS = np.array([[3, 1, 4], [1, 5, 9]], np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def outputs(states_NxBxLxD):
    hidden = {
        "embed": states_NxBxLxD[0],
        "resid": jnp.concatenate([states_NxBxLxD[1:-1], jnp.zeros((1, 2, 3, 8))]),
        "final": states_NxBxLxD[-1],
    }
    return types.Outputs(None, hidden)


def states(seed=1):
    return jax.random.normal(jax.random.key(seed), (4, 2, 3, 8))


def test_a_token_has_one_vector():
    """Catches a draw by position, and a table that moves with the batch."""
    vectors = random_mapping.vectors(TOKENS, 8, seed=2)
    np.testing.assert_array_equal(vectors[0, 1], vectors[1, 0])
    assert np.any(vectors[0, 0] != vectors[0, 1])
    alone = random_mapping.vectors(TOKENS[:1, 2:], 8, seed=2)
    np.testing.assert_array_equal(alone[0, 0], vectors[0, 2])
    other = random_mapping.vectors(TOKENS, 8, seed=3)
    assert np.all(other != vectors)


def test_vectors_are_standard_normal():
    """Catches a uniform draw, and unit vectors."""
    tokens = np.arange(400, dtype=np.int32)[None]
    vectors = np.asarray(random_mapping.vectors(tokens, 64))
    assert abs(vectors.mean()) < 0.02
    assert abs(vectors.std() - 1) < 0.02
    assert abs((vectors**4).mean() - 3) < 0.15


@pytest.mark.parametrize("factor", [2.5, -0.01])
def test_states_along_their_vectors_have_no_loss(factor):
    """Catches a cosine that keeps its sign, or is not scaled by lengths."""
    vectors = random_mapping.vectors(TOKENS, 8).astype(float)
    found = outputs(jnp.broadcast_to(factor * vectors, (4, 2, 3, 8)))
    np.testing.assert_allclose(random_mapping.mismatch(found, vectors), 0, atol=1e-12)


def test_every_layer_and_position_counts_alike():
    """One of 4 * 6 states set right. Catches a mask, and the last block's raw state."""
    vectors = random_mapping.vectors(TOKENS, 8).astype(float)
    before = random_mapping.mismatch(outputs(states()), vectors)
    for layer in range(4):
        h, r = states()[layer, 1, 2], vectors[1, 2]
        lost = 1 - abs(h @ r) / jnp.linalg.norm(h) / jnp.linalg.norm(r)
        right = states().at[layer, 1, 2].set(r)
        after = random_mapping.mismatch(outputs(right), vectors)
        np.testing.assert_allclose(before - after, lost / 24, rtol=1e-9)


def test_isotropic_states_of_width_64():
    """1 - sqrt(2 / (pi D)) = 0.9003. Catches a square in place of the size."""
    shape = (1, 20000, 64)
    vectors, h = (jax.random.normal(jax.random.key(i), shape) for i in (0, 1))
    hidden = {"embed": h, "resid": h[None], "final": h}
    value = random_mapping.mismatch(types.Outputs(None, hidden), vectors)
    np.testing.assert_allclose(value, 0.9003, atol=2e-3)


def test_gradient_is_finite_at_zero():
    """Catches the NaN of a norm at zero."""
    vectors = random_mapping.vectors(TOKENS, 8).astype(float)
    zero = jnp.zeros((4, 2, 3, 8))
    slope = jax.jit(jax.grad(lambda h: random_mapping.mismatch(outputs(h), vectors)))
    grads = slope(zero)
    assert np.all(np.isfinite(grads))


def test_parts_of_a_batch_add_up():
    """Catches a mean of which the number of parts is forgotten, and a part's other mask."""

    def model(scale, tokens, rng=None, attended=None):
        del rng
        h = scale * jnp.sin(tokens[..., None] + jnp.arange(8.0)[None, None] ** 2)
        h = h + attended[..., None]
        return types.Outputs(None, {"embed": h, "resid": h[None], "final": h**2})

    rows = types.Batch(jnp.asarray(TOKENS), jnp.array([[1.0, 1, 1], [1, 0, 0]]))
    whole, halves = (random_mapping.random_mapping(model, 0, n) for n in (1, 2))
    np.testing.assert_allclose(whole(2.0, rows), halves(2.0, rows), rtol=1e-12)
