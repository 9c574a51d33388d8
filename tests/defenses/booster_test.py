"""Booster: nulls, closed form, length of the look-ahead, order of the extra term.

Mutants:
  `(params), -ctx.hp.alpha,` -> `(params), ctx.hp.alpha,`
  `tree.sub(grad_h, grad_h_after)` -> `tree.sub(grad_h_after, grad_h)`
  `tree.normalize(grad_h)` -> `grad_h`
  `tampered, batches["harmful"]` -> `tampered, batches["alignment"]`
  `grad_f, ctx.hp.lam, gain` -> `grad_f, 1.0, gain`
  `vaccine.Hparams(rho=ctx.hp.rho)` -> `vaccine.Hparams(rho=ctx.hp.alpha)`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import booster
from ftdefense.defenses import vaccine
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

DATA = {"alignment": batch(1), "harmful": batch(2)}


def test_closed_form_on_quadratics():
    """grad h falls by exactly alpha along itself. Catches either sign, either factor."""
    w, a, b = (jax.random.normal(jax.random.key(i), (5,)) for i in range(3))
    hp = booster.Hparams(lam=5.0, alpha=0.1)
    ctx = types.Context(common.quadratic, None, None, hp)
    data = {"alignment": a, "harmful": b}
    grads, metrics = booster.direction(ctx, w, data, common.KEY)
    expected = (w - a) + 0.5 * (w - b) / jnp.linalg.norm(w - b)
    np.testing.assert_allclose(grads, expected, rtol=1e-6)
    assert metrics["gain/harmful"] > 0


@pytest.mark.parametrize("null", [{"lam": 0.0}, {"alpha": 0.0}])
def test_reduces_to_sft(null):
    """B1. Catches a term outside the factors, and a second harmful batch."""
    grads, _ = common.directed(booster, booster.Hparams(**null), DATA)
    common.equal(grads, common.sft_gradient(DATA["alignment"]))


def test_the_extra_term_is_a_hessian_product():
    """B4: (term / alpha) -> H ghat. Catches a term of the wrong point or order."""
    alpha = 1e-5
    hp = booster.Hparams(lam=1.0, alpha=alpha)
    grads, _ = common.directed(booster, hp, DATA)
    sft = common.sft_gradient(DATA["alignment"])
    term = jax.tree.map(lambda g, s: (g - s) / alpha, grads, sft)
    h = common.sft_gradient(DATA["harmful"])
    loss = losses.next_token(common.MODEL)

    def gradient(w):
        return jax.grad(loss)(w, DATA["harmful"])

    def product(w, v):
        return jax.jvp(gradient, (w,), (v,))[1]

    exact = jax.jit(product)(common.params(), tree.normalize(h))
    error = tree.norm(jax.tree.map(jnp.subtract, term, exact)) / tree.norm(exact)
    assert error < 1e-3


def test_the_harmful_loss_is_lower_ahead():
    """B3. Catches ascent (the sign in another group's port of Booster)."""
    hp = booster.Hparams(lam=1.0, alpha=0.01)
    _, metrics = common.directed(booster, hp, DATA)
    rise = metrics["gain/harmful"] / (0.01 * metrics["norm/harmful"])
    np.testing.assert_allclose(rise, 1.0, rtol=0.1)


def test_with_vaccine_the_alignment_gradient_is_vaccines():
    """Catches a shift under the harmful passes, the wrong rho, and a plain gradient."""
    hp = booster.Hparams(lam=0.5, perturb_aware=True, rho=3.0)
    plain, _ = common.directed(booster, booster.Hparams(lam=0.5), DATA)
    both, metrics = common.directed(booster, hp, DATA)
    expected, _ = common.directed(vaccine, vaccine.Hparams(rho=3.0), DATA)
    without = common.sft_gradient(DATA["alignment"])
    total = jax.tree.map(lambda p, s, v: p - s + v, plain, without, expected)
    common.close(both, total, atol=1e-12)
    assert metrics["norm/shift"] == pytest.approx(3.0)
