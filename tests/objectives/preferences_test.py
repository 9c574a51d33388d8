"""Golden values and slopes of the preference losses, from their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import preferences


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(*values):
    return jnp.asarray(values, jnp.float64)


@pytest.mark.parametrize(("margin", "value"), [(0.0, 0.693147), (5.0, 0.474077)])
def test_dpo(margin, value):
    """ln 2 at the reference. Catches a swapped pair and a factor 2 / beta."""
    loss = preferences.dpo(array(margin + 1.0), array(1.0), 0.1)
    np.testing.assert_allclose(loss, [value], atol=1e-6)


def test_rows_without_a_partner_are_refused():
    """Catches rows that a reshape would pair with the wrong ones."""
    three, five = (
        types.Batch(np.zeros((rows, 4), np.int32), np.ones((rows, 4)))
        for rows in (3, 5)
    )
    with pytest.raises(errors.UserError, match="one to one"):
        preferences.check_pairs(three, five)


def test_ipo_is_zero_at_its_target():
    """1 / (2 beta) = 5. Catches 1 / beta."""
    np.testing.assert_allclose(preferences.ipo(array(6.0), array(1.0), 0.1), [0.0])
    np.testing.assert_allclose(preferences.ipo(array(0.0), array(0.0), 0.1), [25.0])


def test_kto_parts():
    """K2. Catches a sign of the undesirable side, and z0 on the wrong side."""
    loss = preferences.kto(array(3.0, -2.0), jnp.array([True, False]), 1.0, 0.1)
    np.testing.assert_allclose(loss, [0.450166003, 0.425557483], atol=1e-9)


def test_kto_at_the_reference():
    """K1: half the weight, slope -+ lam beta / 4. Catches a gradient through z0."""
    desirable = jnp.array([True, False])

    def total(s):
        return jnp.sum(preferences.kto(s, desirable, jnp.mean(s), 0.1, 1.0, 2.0))

    s = array(0.0, 0.0)
    np.testing.assert_allclose(total(s), 1.5)
    np.testing.assert_allclose(jax.grad(total)(s), [-0.025, 0.05])


def test_kto_is_bounded():
    """K3. Catches an unbounded utility."""
    desirable = jnp.array([True, False])
    loss = preferences.kto(array(-1e4, 1e4), desirable, 0.0, 0.1, 1.0, 2.0)
    np.testing.assert_allclose(jnp.mean(loss), 1.5)


def test_kto_reference_is_clamped_and_constant():
    """K4. Catches a missing clamp at zero."""
    np.testing.assert_allclose(preferences.kto_reference(array(-3.0, 1.0)), 0.0)
    np.testing.assert_allclose(preferences.kto_reference(array(3.0, 1.0)), 2.0)
    slope = jax.grad(lambda s: preferences.kto_reference(s))(array(3.0, 1.0))
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize(
    ("s", "value", "slope"),
    [(0.0, 13.862944, 1.0), (-5.0, 9.481540, None), (-20.0, None, 0.238406)],
)
def test_npo(s, value, slope):
    """Catches the sign of s, and a missing 2 / beta."""
    loss, grad = jax.value_and_grad(lambda s: preferences.npo(s, 0.1))(jnp.float64(s))
    if value is not None:
        np.testing.assert_allclose(loss, value, atol=1e-6)
    if slope is not None:
        np.testing.assert_allclose(grad, slope, atol=1e-6)
