"""Distances between hidden states: values of the specs, and safe gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.objectives import distances


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


mmd = jax.jit(distances.mmd)


def rows(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_mmd_of_one_sample_with_itself_is_zero():
    """Catches a sign in the four blocks."""
    x = rows(0, 4, 7)
    np.testing.assert_allclose(mmd(x, x), 0.0, atol=1e-12)


def test_mmd_is_symmetric():
    """Catches a block that is taken twice."""
    x, y = rows(0, 4, 7), 2 + rows(1, 4, 7)
    np.testing.assert_allclose(mmd(x, y), mmd(y, x), rtol=1e-12)


def test_mmd_of_single_rows_is_a_constant():
    """10 - 2 sum exp(-4 / 2^i). Catches the bandwidth's divisor or its exponents."""
    for scale in (0.1, 30.0):
        value = mmd(scale * rows(0, 1, 7), rows(1, 1, 7))
        np.testing.assert_allclose(value, 6.186276, atol=1e-6)


def test_mmd_in_high_dimension():
    """The biased estimator's values of the specs, B = 4. Catches an unbiased mean."""
    x, y = rows(0, 4, 20000), rows(1, 4, 20000)
    np.testing.assert_allclose(mmd(x, y), 1.55, atol=0.02)
    np.testing.assert_allclose(mmd(0.01 * x, y), 3.27, atol=0.02)


def test_mmd_bandwidth_is_a_constant_of_the_gradient():
    """B = 1: value constant, gradient not. Catches a missing stop_gradient."""
    x, y = rows(0, 1, 7), rows(1, 1, 7)
    width = np.sum((x - y) ** 2) / 4
    slope = sum(np.exp(-4 / 2**i) / (width * 2**i) for i in range(5))
    np.testing.assert_allclose(
        jax.jit(jax.grad(distances.mmd))(x, y), 4 * slope * (x - y), rtol=1e-10
    )


def test_mmd_of_zeros_has_a_finite_gradient():
    """Catches 0 / 0 in the bandwidth where a mask leaves nothing."""
    zero = jnp.zeros((3, 5))
    value, grad = jax.jit(jax.value_and_grad(distances.mmd))(zero, zero)
    assert value == 0
    np.testing.assert_array_equal(grad, 0.0)


def test_mmd_widens_bfloat16():
    """Catches distances summed in bfloat16."""
    x = rows(0, 2, 5).astype(jnp.bfloat16)
    assert mmd(x, x).dtype == jnp.float32


def test_norm_and_cosine_at_zero():
    """Catches sqrt'(0) = inf, and 0 / 0."""
    zero, x = jnp.zeros(3), jnp.array([3.0, 0.0, 4.0])
    assert distances.norm(x) == 5
    for fn in (distances.norm, lambda v: distances.cosine(v, x)):
        value, grad = jax.value_and_grad(fn)(zero)
        assert value == 0
        np.testing.assert_array_equal(grad, 0.0)


def test_cosine_ignores_lengths():
    """Catches a dot product that is divided by one length only."""
    x, y = rows(0, 5), rows(1, 5)
    expected = x @ y / np.sqrt((x @ x) * (y @ y))
    np.testing.assert_allclose(distances.cosine(3 * x, 0.2 * y), expected, rtol=1e-12)


def test_attended_ends_with_the_answer():
    """Catches a mask that drops the prompt, or keeps the padding."""
    weights = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], np.float32)
    batch = types.Batch(np.zeros((3, 5), np.int32), weights)
    expected = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(distances.attended(batch), expected)
