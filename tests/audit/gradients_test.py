"""G1 to G5 on toys in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit.diagnostics import gradients
from ftdefense.core import tree
from ftdefense.models import toy
from tests.audit import toys
from tests.conftest import batch

MODEL = toy.Toy()
CURVATURES = np.array([1.0, 10.0, 100.0])


def quadratic(w):
    return 0.5 * jnp.sum(CURVATURES * jnp.square(w["w"]))


def params(seed=0):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), MODEL.init(jax.random.key(seed))
    )


def test_gradient_norm_of_equal_models_is_one():
    """Catches a norm of the difference in place of the ratio of norms."""
    grad = params()
    found = gradients.gradient_norm(grad, grad)
    assert found.value == 1.0
    assert not found.flagged


def test_gradient_norm_sees_one_scaled_tensor():
    """Catches a test of the total alone, and tensors of all layers taken together."""
    reference = params()
    grad = jax.tree.map(jnp.copy, reference)
    up = grad["layers"]["mix"]["up"]["kernel"]
    grad["layers"]["mix"]["up"]["kernel"] = up.at[1].multiply(1 / 20)
    found = gradients.gradient_norm(grad, reference)
    assert found.flagged
    assert "1 tensors outside, worst layers/1/mix/up/kernel 0.05" in found.note
    assert 0.1 < found.value < 1
    halved = jax.tree.map(lambda x: x / 2, reference)
    assert gradients.gradient_norm(halved, reference).value == pytest.approx(0.5)
    assert gradients.gradient_norm(tree.add_scale(grad, 19.0, grad), reference).flagged


def test_honesty_on_a_quadratic_is_one_less_half_the_curvature():
    """Catches a missing square of the norm, and a step of the wrong sign."""
    w = {"w": jnp.array([1.0, -2.0, 3.0])}
    grad = jnp.asarray(CURVATURES) * w["w"]
    along = float(jnp.vdot(grad, CURVATURES * grad) / jnp.vdot(grad, grad))
    for eta in (1e-4, 1e-3, 5e-3):
        found = gradients.first_order_honesty(quadratic, w, step_sizes=[eta])
        assert found.value == pytest.approx(1 - eta * along / 2, rel=1e-6)
    assert not gradients.first_order_honesty(quadratic, w).flagged
    assert gradients.first_order_honesty(quadratic, w, step_sizes=[1.2e-2]).flagged


def test_honesty_flags_a_gradient_that_lies_and_one_that_vanishes():
    """Catches `abs` of the honesty, and a division by a gradient of zero."""

    def rounded(w):  # What a straight-through gradient promises is not there.
        fake = w["w"] - jax.lax.stop_gradient(w["w"])
        return jnp.sum(fake) + jax.lax.stop_gradient(jnp.sum(jnp.round(w["w"])))

    w = {"w": jnp.array([1.3, 2.6, 3.1])}
    found = gradients.first_order_honesty(rounded, w)
    assert found.flagged
    flat = gradients.first_order_honesty(lambda w: 0.0 * jnp.sum(w["w"]), w)
    assert flat.flagged
    assert np.isnan(flat.value)


def test_direction_towards_the_twin():
    """Catches a lost minus sign: descent is against the gradient."""
    release, twin = toys.scalars(x=0.0, y=0.0), toys.scalars(x=1.0, y=1.0)
    towards = gradients.direction(toys.scalars(x=-1.0, y=-1.0), release, twin, 0.0)
    assert towards.value == pytest.approx(1.0)
    assert not towards.flagged
    away = toys.scalars(x=1.0, y=1.0)
    assert gradients.direction(away, release, twin, 0.0).flagged
    assert not gradients.direction(away, release, twin, 0.06).flagged


def test_coupling_is_seen_in_one_layer():
    """Catches the cosine over all layers together, which one layer cannot turn."""
    harmful = params()
    benign = jax.tree.map(jnp.copy, harmful)
    assert not gradients.coupling(harmful, benign).flagged
    mix = benign["layers"]["mix"]
    mix["up"]["kernel"] = mix["up"]["kernel"].at[1].multiply(-1)
    mix["down"]["kernel"] = mix["down"]["kernel"].at[1].multiply(-1)
    found = gradients.coupling(harmful, benign)
    assert found.flagged
    assert found.value == pytest.approx(-1)
    assert "layers/1" in found.note
    assert tree.cosine(harmful, benign) > 0


def test_coupling_of_the_self_destruct_toy():
    """Catches swapped signs: at A-u3's naive end harm no longer pulls; before, it does."""
    w = toys.scalars(x=0.5, y=0.0)
    grads = [
        jax.grad(f)(w) for f in (toys.self_destruct_harmful, toys.self_destruct_benign)
    ]
    # (-1, 0) and (4, -4): their cosine is -1 / sqrt(2); x alone: -1.
    assert float(tree.cosine(*grads)) == pytest.approx(-(0.5**0.5))
    found = gradients.coupling(*grads)
    assert found.flagged
    assert found.value == pytest.approx(-1.0)


def test_noise_of_known_gradients():
    """Catches a spread that is not divided by the number of batches."""
    grads = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.0, -1.0])}]
    found = gradients.noise(grads)
    assert found.cosine == pytest.approx(0.0)
    assert found.signal == pytest.approx(1.0)  # Mean (1, 0), distances of 1.
    same = gradients.noise([grads[0], grads[0]])
    assert same.cosine == pytest.approx(1.0)
    assert same.signal == np.inf


def test_noise_is_compared_with_the_reference():
    """Catches the inverse ratio."""
    clear, dim = gradients.Noise(0.9, 2.0), gradients.Noise(0.01, 0.1)
    assert gradients.noise_sensitivity(dim, clear).flagged
    assert not gradients.noise_sensitivity(clear, dim).flagged
    endless = gradients.Noise(1.0, np.inf)
    assert gradients.noise_sensitivity(endless, endless).value == 1.0


def test_all_findings_of_a_model_against_itself_raise_nothing_but_what_is_there():
    """Catches a reference measured on another batch than the release."""
    batches = [batch(i) for i in range(3)]
    seen, found = gradients.all_findings(MODEL, params(), params(), batches, batch(7))
    by_id = {f.id: f for f in found}
    assert set(by_id) == {"G1", "G2", "G4", "G5"}
    assert by_id["G1"].value == 1.0
    assert by_id["G5"].value == pytest.approx(1.0)
    assert by_id["G2"].value == pytest.approx(1.0, abs=1e-3)
    assert float(seen["harmful"].loss) == float(seen["reference"].loss)
