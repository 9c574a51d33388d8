"""Flat spectrum: the term's golden values, its slope, its nulls.

Mutants:
      `ctx.hp.lam * s` -> `-ctx.hp.lam * s`
      `g + ctx.hp.lam * s` -> `g + s`
      `length / jnp.where(there, nuclear, 1)` -> `jnp.where(there, nuclear, 1) / length` in objectives/spectra.py
      `a_IxR.shape[1] ** -0.5` -> `a_IxR.shape[0] ** -0.5` in objectives/spectra.py
      `jnp.where(there, ratio, 0.0)` -> `ratio` in objectives/spectra.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.defenses import flat_spectrum
from ftdefense.methods import adapters
from ftdefense.methods import optimizers
from ftdefense.objectives import spectra

from ..conftest import batch
from . import toy_lineage as toys

LORA = adapters.LoRA(alpha=4.0, rank=4, targets=("up", "down"))
HP = flat_spectrum.Hparams(optimizers.Optimizer(1e-3), LORA)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def factors(seed=0):
    """An adapter some way into its training: B is not 0."""
    start = LORA.init(toys.params(), toys.KEY)
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), start)


def run(hp, params):
    ctx = toys.context(hp)
    data = {"user": batch(1)}
    step = jax.jit(lambda p: flat_spectrum.direction(ctx, p, data, toys.KEY))
    return step(params)


def test_golden_values():
    """B.7: 0 of the identity of rank 4, 0.5 of rank one among four, at any scale.
    Catches a width for a rank.
    """
    eye = jnp.eye(6, 4)
    np.testing.assert_allclose(spectra.concentration(eye, eye.T), 0.0, atol=1e-12)
    one = eye @ jnp.diag(jnp.array([1.0, 0, 0, 0]))
    for scale in (1.0, 1e-3, 1e3):
        found = spectra.concentration(scale * one, eye.T)
        np.testing.assert_allclose(found, 0.5, rtol=1e-9)
    two = eye @ jnp.diag(jnp.array([3.0, 4, 0, 0]))
    np.testing.assert_allclose(spectra.concentration(two, eye.T), 5 / 7 - 0.5)


def test_is_of_the_dense_product():
    """From NumPy's singular values. Catches vectors of the factors, not the product."""
    a, b = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((1, (7, 3)), (2, (3, 5)))
    )
    s = np.linalg.svd(np.asarray(a @ b), compute_uv=False)
    expected = np.sqrt((s**2).sum()) / s.sum() - 3**-0.5
    np.testing.assert_allclose(spectra.concentration(a, b), expected, rtol=1e-10)


def test_slope_is_the_derivative():
    """By central differences. Catches a gradient of one of the two norms alone."""
    params = factors()
    slope = jax.grad(spectra.mean_concentration)(params)
    way = factors(9)

    def along(t):
        moved = jax.tree.map(lambda x, v: x + t * v, params, way)
        return spectra.mean_concentration(moved)

    central = (along(1e-5) - along(-1e-5)) / 2e-5
    dot = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, slope, way))
    np.testing.assert_allclose(dot, central, rtol=1e-6)


def test_a_fresh_adapter_feels_nothing():
    """B = 0. Catches 0 / 0."""
    start = LORA.init(toys.params(), toys.KEY)
    grads, metrics = run(HP, start)
    plain, _ = run(HP.replace(lam=0.0), start)
    toys.same(grads, plain)
    assert metrics["concentration/adapter"] == 0


def test_without_weight_it_is_sft():
    """Exactly. Catches a term outside of lam."""
    params = factors()
    grads, _ = run(HP.replace(lam=0.0), params)
    ctx = toys.context(HP)
    toys.same(grads, jax.jit(jax.grad(ctx.loss))(params, batch(1), None))


def test_the_term_is_added():
    """Catches its sign, and a weight that is lost."""
    params = factors()
    grads, _ = run(HP.replace(lam=3.0), params)
    plain, _ = run(HP.replace(lam=0.0), params)
    slope = jax.grad(spectra.mean_concentration)(params)
    toys.close(grads, jax.tree.map(lambda g, s: g + 3 * s, plain, slope))


def test_descent_flattens():
    """lam alone lowers the concentration. Catches an ascent."""
    params = factors()
    slope = jax.grad(spectra.mean_concentration)(params)
    after = jax.tree.map(lambda x, s: x - 0.1 * s, params, slope)
    assert spectra.mean_concentration(after) < spectra.mean_concentration(params)


def test_needs_factors():
    """Catches an AttributeError within a step."""
    with pytest.raises(errors.UserError, match="adapter=lora"):
        flat_spectrum.streams(flat_spectrum.Hparams())
