"""Condition number: C1 on a linear extractor, and the gradient on the toy.

Mutants:
  `f + hp.lam_retain * well + hp.lam_harmful * ill` -> `f + hp.lam_retain * well - hp.lam_harmful * ill`
  `conditioning.well(kept), conditioning.ill(hurt)` -> `conditioning.well(hurt), conditioning.ill(kept)`
  `outputs.hidden["final"][:, :-1]` -> `outputs.hidden["final"][:, 1:]`
  `rows * (length - 1) < wanted` -> `rows * length < 0`
  `jnp.square(s.largest) / 2 -` -> `jnp.square(s.largest) -` in objectives/conditioning.py
  `- jnp.square(s.smallest) / 2` -> `- s.smallest / 2` in objectives/conditioning.py
  `/ gram_DxD.shape[0]` -> `/ 7` in objectives/conditioning.py
  `values_D > 0` -> `values_D > -1` in objectives/conditioning.py
  `eigh(jax.lax.stop_gradient(gram_DxD))` -> `eigh(gram_DxD)` in objectives/conditioning.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.defenses import condition_number
from ftdefense.objectives import conditioning
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

WIDTH = 6
DATA = {"retain": batch(1), "harmful": batch(2)}
HP = condition_number.Hparams(lam_retain=0.3, lam_harmful=20.0)


def inputs():
    rng = np.random.default_rng(0)
    return jnp.array(rng.standard_normal((60, WIDTH)) * np.arange(1, WIDTH + 1))


def extractor():
    rng = np.random.default_rng(1)
    return jnp.eye(WIDTH) + 0.1 * jnp.array(rng.standard_normal((WIDTH, WIDTH)))


def hessian(theta):
    """theta' K theta, through the features of one row of 60 tokens."""
    features = inputs() @ theta
    return conditioning.gram(features[None], jnp.ones((1, 60)))


def spectrum(theta):
    return conditioning.spectrum(hessian(theta))


def closed_forms(theta):
    """(gradient of R_well, of R_ill) from singular vectors, without autodiff."""
    k, h = inputs().T @ inputs(), hessian(theta)
    s, v = np.linalg.eigh(h)
    gap = (s**2).sum() / (2 * WIDTH) - s[0] ** 2 / 2
    top, bottom = (s[i] * np.outer(v[:, i], v[:, i]) - h / WIDTH for i in (-1, 0))
    return 2 * k @ theta @ top, 2 * k @ theta @ bottom / gap**2


def kappa(theta):
    return np.linalg.cond(hessian(theta))


@pytest.mark.parametrize("i", [0, 1])
def test_gradients_have_closed_forms(i):
    """C1, jitter aside. Catches a factor, a wrong end, a gradient of the vectors."""
    penalty = (conditioning.well, conditioning.ill)[i]
    grad = jax.grad(lambda theta: penalty(spectrum(theta)))(extractor())
    expected = closed_forms(extractor())[i]
    error = np.abs(grad - expected).max() / np.abs(expected).max()
    assert error < 1e-6


def test_small_preconditioned_steps_move_kappa_the_right_way():
    """C1: down by R_well, up by R_ill; too large a step fails. Catches a sign."""
    k = inputs().T @ inputs()
    theta = extractor()
    well, ill = (
        jnp.linalg.solve(k, jax.grad(lambda t, p=p: p(spectrum(t)))(theta))
        for p in (conditioning.well, conditioning.ill)
    )
    here = kappa(theta)
    assert kappa(theta - 1e-5 * well) < here < kappa(theta - 1e4 * ill)
    assert kappa(theta - 1e-3 * well) > here


def test_values():
    """R_well = 0 at kappa = 1, R_ill > 0. Catches ||S|| for ||S||^2, or jitter in it."""
    white = jnp.linalg.inv(jnp.linalg.cholesky(inputs().T @ inputs())).T
    np.testing.assert_allclose(conditioning.well(spectrum(white)), 0.0, atol=1e-5)
    s = conditioning.spectrum(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
    np.testing.assert_allclose(conditioning.well(s), (4 + 1e-6) ** 2 / 2 - 21 / 6)
    np.testing.assert_allclose(conditioning.ill(s), 1 / (21 / 6 - (1 + 1e-6) ** 2 / 2))
    np.testing.assert_allclose(conditioning.log_condition(s), np.log(4), atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_equal_singular_values_are_harmless(size):
    """Catches the NaN of eigenvectors' gradients, and a denominator of zero."""
    for penalty in (conditioning.well, conditioning.ill):
        value, grad = jax.value_and_grad(
            lambda s, p=penalty: p(conditioning.spectrum(s))
        )(size * jnp.eye(4))
        assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_null_space_is_passed_over():
    """Fewer rows than features. Catches a singular value below zero."""
    s = jnp.diag(jnp.array([-1e-9, 0.0, 3.0, 5.0]))
    np.testing.assert_allclose(conditioning.spectrum(s)[:2], (5 + 1e-6, 3 + 1e-6))


def toy_gradient(hp, projection=None):
    """f + lam_retain R_well + lam_harmful R_ill with the closed derivatives in S."""

    def grams(w):
        found = []
        for role in ("retain", "harmful"):
            rows = DATA[role]
            phi = common.MODEL(w, rows.tokens).hidden["final"][:, 1:4].reshape(-1, 8)
            phi = phi if projection is None else phi @ projection
            found.append(phi.T @ phi)
        return found

    weights = common.params()
    kept, hurt = (np.asarray(s) for s in grams(weights))
    count = kept.shape[0]

    def slope(s, i):
        values, v = np.linalg.eigh(s)
        return (values[i] + 1e-6) * np.outer(v[:, i], v[:, i]) - s / count

    least = np.linalg.eigvalsh(hurt)[0] + 1e-6
    gap = (hurt**2).sum() / (2 * count) - least**2 / 2
    slopes = hp.lam_retain * slope(kept, -1), hp.lam_harmful * slope(hurt, 0) / gap**2

    def total(w):
        f = losses.next_token(common.MODEL)(w, DATA["retain"])
        return f + sum(jnp.sum(a * b) for a, b in zip(slopes, grams(w), strict=True))

    return jax.jit(jax.grad(total))(weights)


def test_toy_gradient():
    """Catches features of prompts, of the next position, or roles exchanged."""
    grads, _ = common.directed(condition_number, HP, DATA)
    common.close(grads, toy_gradient(HP), rtol=1e-7, atol=1e-9)


def test_parts_give_the_whole():
    """Catches a penalty of each microbatch: a Gram matrix is a sum over all rows."""
    whole, metrics = common.directed(condition_number, HP, DATA)
    parts, same = common.directed(condition_number, HP.replace(microbatches=2), DATA)
    common.close(parts, whole, rtol=1e-9, atol=1e-12)
    common.close(same, metrics, rtol=1e-9)


def test_subspace():
    """Catches directions that are not orthonormal, or not frozen."""
    basis = conditioning.subspace(8, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    hp = HP.replace(subspace=3)
    grads, _ = common.directed(condition_number, hp, DATA)
    expected = toy_gradient(hp, basis.astype(jnp.float64))
    common.close(grads, expected, rtol=1e-6, atol=1e-8)


def test_reduces_to_sft():
    """lam = 0. Catches a term that no coefficient scales."""
    hp = condition_number.Hparams(lam_retain=0.0, lam_harmful=0.0)
    grads, _ = common.directed(condition_number, hp, DATA)
    common.close(grads, common.sft_gradient(DATA["retain"]))


def test_too_few_rows_are_refused():
    """Catches a Gram matrix that must be singular, without a word."""
    few = jax.tree.map(lambda x: x[:1], DATA)
    with pytest.raises(errors.UserError, match="subspace"):
        common.directed(condition_number, HP, few)
    common.directed(condition_number, HP.replace(subspace=3), few)
