"""Nulls and closed forms of the defenses, in float64 on quadratics and the toy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import booster
from ftdefense.defenses import ctrap
from ftdefense.defenses import lox
from ftdefense.defenses import vaccine
from ftdefense.methods import lift
from ftdefense.models import toy
from ftdefense.objectives import losses

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def quadratic(w, center, rng=None):
    """Half the squared distance: its Hessian is the identity."""
    del rng
    return 0.5 * jnp.sum(jnp.square(w - center))


def params():
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), MODEL.init(jax.random.key(3))
    )


def context(hp):
    return lift.context(MODEL, types.Lineage(params()), hp)


def sft_gradient(data):
    loss = losses.next_token(MODEL)
    return jax.jit(jax.grad(loss))(params(), data)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_booster_closed_form():
    """grad h falls by exactly alpha along itself. Catches either sign, either factor."""
    w, a, b = (jax.random.normal(jax.random.key(i), (5,)) for i in range(3))
    hp = booster.Hparams(lam=5.0, alpha=0.1)
    ctx = types.Context(quadratic, None, None, hp)
    grads, metrics = booster.direction(ctx, w, {"alignment": a, "harmful": b}, KEY)
    expected = (w - a) + 0.5 * (w - b) / jnp.linalg.norm(w - b)
    np.testing.assert_allclose(grads, expected, rtol=1e-6)
    assert metrics["gain/harmful"] > 0


@pytest.mark.parametrize("null", [{"lam": 0.0}, {"alpha": 0.0}])
def test_booster_reduces_to_sft(null):
    """Catches a term outside the factors lam and alpha."""
    data = {"alignment": batch(1), "harmful": batch(2)}
    hp = booster.Hparams(**null)
    grads, _ = jax.jit(lambda p: booster.direction(context(hp), p, data, KEY))(params())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15),
        grads,
        sft_gradient(data["alignment"]),
    )


def test_ctrap_reduces_to_sft():
    """Catches a collapse term that lam does not scale."""
    data = {"retain": batch(1), "harmful": batch(2)}
    grads, _ = ctrap.direction(context(ctrap.Hparams(lam=0.0)), params(), data, KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15),
        grads,
        sft_gradient(data["retain"]),
    )


def test_ctrap_without_a_step_collapses_in_place():
    """alpha = 0: retain + lam * collapse at w. Catches a shift of w elsewhere."""
    data = {"retain": batch(1), "harmful": batch(2)}
    hp = ctrap.Hparams(lam=0.5, alpha=0.0, collapse_token=3)
    grads, _ = ctrap.direction(context(hp), params(), data, KEY)
    collapse = losses.next_token(MODEL, losses.toward(3))
    expected = tree.add_scale(
        sft_gradient(data["retain"]),
        0.5,
        jax.grad(collapse)(params(), data["retain"]),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13),
        grads,
        expected,
    )


def test_ctrap_second_order_differs_by_the_hessian_term():
    """exact - first order = -alpha H g. Catches a stop_gradient in the exact form."""

    def harmful(w):
        return jnp.sum(w**4)

    def judged(w):
        return jnp.sum(jnp.sin(w))

    w = jnp.linspace(0.2, 1.0, 5)
    options = {"alpha": 0.05, "normalize": False}
    _, first = ctrap.look_ahead(harmful, judged, **options)(w)
    _, exact = ctrap.look_ahead(harmful, judged, second_order=True, **options)(w)
    hessian_term = -0.05 * (12 * w**2) * first
    np.testing.assert_allclose(exact - first, hessian_term, rtol=1e-6)


def test_look_ahead_has_length_alpha():
    """Catches a norm per leaf: the displacement is alpha over the whole tree."""
    start = {"a": jnp.ones(3), "b": jnp.full((2,), 2.0)}

    def attacked(w):
        return jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 3)

    def distance(w):
        return tree.norm(jax.tree.map(jnp.subtract, w, start))

    (moved, _), _ = ctrap.look_ahead(attacked, distance, alpha=0.25)(start)
    np.testing.assert_allclose(moved, 0.25, rtol=1e-6)


def test_vaccine_reduces_to_sft():
    """rho = 0, exactly. Catches a clean term beside the shifted one."""
    data = {"alignment": batch(1)}
    grads, _ = jax.jit(
        lambda p: vaccine.direction(context(vaccine.Hparams(rho=0.0)), p, data, KEY)
    )(params())
    same(grads, sft_gradient(data["alignment"]))


def test_vaccine_shift_has_one_norm():
    """V1, V2: ||shift|| = rho, one ratio to the gradient in all layers."""
    ctx = context(vaccine.Hparams(rho=2.0))
    _, metrics = vaccine.direction(ctx, params(), {"alignment": batch(1)}, KEY)
    np.testing.assert_allclose(metrics["norm/shift"], 2.0, rtol=1e-5)


def test_vaccine_first_order_rise():
    """V5: the loss rises by rho ||g||. Catches a descent in place of the ascent."""
    ctx = context(vaccine.Hparams(rho=1e-3))
    _, g = vaccine.shift_gradient(ctx, params(), batch(1), None, "attn")
    _, metrics = vaccine.direction(ctx, params(), {"alignment": batch(1)}, KEY)
    rise = metrics["loss/shifted"] - metrics["loss/alignment"]
    np.testing.assert_allclose(rise / (1e-3 * tree.norm(g)), 1.0, rtol=1e-2)


def test_vaccine_shift_ends_with_the_answer():
    """V6: zero after the last weighted token, not on the prompt."""
    data = batch(1)
    ctx = context(vaccine.Hparams())
    _, g_NxBxLxD = vaccine.shift_gradient(ctx, params(), data, None, "attn")
    # The last token is padding; the one before it predicts nothing that counts.
    np.testing.assert_array_equal(g_NxBxLxD[:, :, -2:], 0.0)
    # The toy's last layer mixes no positions after the shift; its first does.
    assert np.all(np.abs(g_NxBxLxD[0, :, 0]).max(-1) > 0)


def lineage():
    pretrained = params()
    moved = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), MODEL.init(jax.random.key(9))
    )
    aligned = tree.add_scale(pretrained, 0.3, moved)
    return types.Lineage(aligned, aligned, pretrained)


def test_lox_identity_at_zero():
    """alpha = 0. Catches an extrapolation from the wrong weights."""
    same(lox.edit(lineage(), lox.Hparams(alpha=0.0)), lineage().aligned)


def test_lox_full_rank_moves_on_by_alpha():
    """k = 0: W + alpha (W - W0). Catches a transposed or partial reconstruction."""
    origin = lineage()
    edited = lox.edit(origin, lox.Hparams(alpha=0.5, k=0))
    jax.tree.map(
        lambda e, a, p: np.testing.assert_allclose(e, a + 0.5 * (a - p), atol=1e-5),
        edited,
        origin.aligned,
        origin.pretrained,
    )


def test_lox_adds_rank_k_per_layer():
    """Catches an SVD of the stack, and `<=` for `<` in the cut."""
    origin = lineage()
    edited = lox.edit(origin, lox.Hparams(alpha=1.0, k=2))
    difference = jax.tree.map(lambda e, a: e - a, edited, origin.aligned)
    for matrix in difference["layers"]["mix"]["up"]["kernel"]:
        assert np.linalg.matrix_rank(np.asarray(matrix), tol=1e-4) == 2
