"""Calibration: what an adversary can read off, optima, bounds and the envelope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import calibration

VOCAB = 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rows(seed=0, count=6, length=7):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (count, length)).astype(np.int32)
    weights = np.ones((count, length))
    weights[:, :3] = 0
    weights[0, -2:] = 0
    return types.Batch(tokens, weights)


def logits(batch, seed=1, knows=1.0):
    """Random, with `knows` added at the next token."""
    noise = np.random.default_rng(seed).normal(size=(*batch.tokens.shape, VOCAB))
    targets = np.roll(batch.tokens, -1, 1)
    return jnp.asarray(noise + knows * np.eye(VOCAB)[targets])


def nats(logits, batch):
    logps = jax.nn.log_softmax(logits)[:, :-1]
    chosen = jnp.take_along_axis(logps, batch.tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(chosen * batch.weights[:, 1:]) / batch.weights[:, 1:].sum()


LOSS = jax.jit(calibration.loss, static_argnums=(2, 3))


def test_none_is_cross_entropy():
    """Catches unweighted tokens, and a shift the wrong way."""
    batch = rows()
    value = LOSS(logits(batch), batch, "none")
    np.testing.assert_allclose(value, nats(logits(batch), batch), rtol=1e-12)


@pytest.mark.parametrize("knows", [1.0, -3.0, 0.1, 30.0])
def test_scale_is_the_best_on_a_grid(knows):
    """Catches bisection on the wrong side, and a range other than [-1, 1]."""
    batch = rows()
    found = logits(batch, knows=knows)
    grid = jnp.linspace(-1, 1, 4001)
    values = jax.vmap(lambda a: nats(a * found, batch))(grid)
    value = LOSS(found, batch, "scale")
    np.testing.assert_allclose(value, jnp.min(values), rtol=1e-6, atol=1e-12)
    assert value <= jnp.min(values) + 1e-12


def test_certain_and_right_stays_as_it_is():
    """The scale is 1, exactly. Catches an end that is only approached."""
    batch = rows()
    found = logits(batch, knows=30.0)
    same = [LOSS(found, batch, kind) for kind in ("none", "scale")]
    np.testing.assert_allclose(*same, rtol=1e-15)


def test_certain_and_wrong_hides_nothing():
    """Catches logits that are only shrunk: negated, they are read; permuted, mapped."""
    batch = rows()
    right = logits(batch, knows=8.0)
    negated = LOSS(-right, batch, "scale")
    np.testing.assert_allclose(negated, LOSS(right, batch, "scale"), rtol=1e-9)
    permuted = jnp.roll(right, 1, -1)
    assert LOSS(permuted, batch, "none") > 5
    assert LOSS(permuted, batch, "scale") <= np.log(VOCAB) + 1e-12
    assert LOSS(permuted, batch, "map", 3000) <= LOSS(right, batch, "scale")


def test_map_is_optimal_within_the_box():
    """Projected slope zero. Catches a step too long, a box not kept."""
    batch = rows()
    found = logits(batch, knows=2.0)

    def of(map_VxV):
        return nats(found @ map_VxV, batch)

    curvature = jnp.sum(jnp.square(found)) / batch.weights[:, 1:].sum()
    best = calibration.best_map(of, jnp.eye(VOCAB), curvature, 3000)
    assert jnp.max(jnp.abs(best)) <= 1
    slope = jax.grad(of)(best)
    np.testing.assert_allclose(jnp.clip(best - slope, -1, 1), best, atol=1e-5)
    np.testing.assert_allclose(of(best), LOSS(found, batch, "map", 3000), atol=1e-7)


@pytest.mark.parametrize("knows", [1.0, 3.0])
def test_the_default_number_of_steps_is_enough(knows):
    """Catches a step by the trace of the curvature, V times too short."""
    batch = rows()
    found = logits(batch, knows=knows)
    near, far = (LOSS(found, batch, "map", n) for n in (2000, 40_000))
    np.testing.assert_allclose(near, far, rtol=2e-3)


@pytest.mark.parametrize(("kind", "steps"), [("scale", 1), ("map", 3000)])
def test_gradient_is_that_of_the_calibrated_loss(kind, steps):
    """Finite differences. Catches a gradient at the uncalibrated logits."""
    batch = rows()
    found = logits(batch, knows=0.3)
    change = logits(batch, seed=5, knows=0.0)
    grad = jax.jit(jax.grad(calibration.loss), static_argnums=(2, 3))
    slope = jnp.vdot(grad(found, batch, kind, steps), change)
    ends = [LOSS(found + e * change, batch, kind, steps) for e in (1e-4, -1e-4)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-4, slope, rtol=1e-3)


def test_no_weighted_token_is_no_loss():
    """Catches 0 / 0."""
    batch = rows().replace(weights=np.zeros((6, 7)))
    value, grads = jax.value_and_grad(calibration.loss)(logits(batch), batch, "scale")
    assert value == 0
    assert not np.any(grads)


def test_user_errors():
    """Catches a map of a real vocabulary, and a fall-back to none."""
    batch = rows()
    with pytest.raises(errors.UserError, match="scale"):
        calibration.loss(logits(batch), batch, "scales")
    wide = jnp.zeros((1, 2, calibration.MAP_LIMIT + 1))
    one = types.Batch(np.zeros((1, 2), np.int32), np.ones((1, 2)))
    with pytest.raises(errors.UserError, match="calibration=scale"):
        calibration.loss(wide, one, "map")
