"""Panacea: its perturbation, its look-ahead and cap, the final shift, the nulls.

Mutants:
      `grads, -hp.lam, gain` -> `grads, hp.lam, gain`
      `tree.normalize(grad_h)` -> `tree.normalize(grads)`
      `(params), 1.0, eps` -> `(params), -1.0, eps`
      `h_after <= hp.cap` -> `h_after >= hp.cap`
      `, 0) - now` -> `, now) - now`
      `state.hp.post, state.memory` -> `-state.hp.post, state.memory`
      `value_and_grad(shifted, batches["harmful"]` -> `value_and_grad(shifted, batches["user"]`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import panacea
from ftdefense.methods import lift
from ftdefense.methods import optimizers

from ..conftest import batch
from . import toy_lineage as toys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


DATA = {"user": batch(1), "harmful": batch(2)}


def zeros():
    return panacea.memory(None, toys.params(), None)


@jax.jit
def run(hp):
    ctx = toys.context(hp)
    return panacea.direction(ctx, toys.params(), DATA, toys.KEY, zeros())


def test_lam_zero_is_sft():
    """Exact, at any rho. Catches a term that lam does not scale."""
    grads, _, eps = run(panacea.Hparams(lam=0.0))
    toys.same(grads, toys.sft_gradient(DATA["user"]))
    assert tree.norm(eps) > 0


def test_rho_zero_is_sft():
    """At any lam: nothing is gained where nothing moves. Catches a lone grad h."""
    grads, _, eps = run(panacea.Hparams(lam=3.0, rho=0.0))
    toys.same(grads, toys.sft_gradient(DATA["user"]))
    toys.same(eps, zeros())


def test_perturbation_is_rho_long_and_uphill():
    """One norm over the tree. Catches a norm by leaf, and a descent."""
    _, metrics, eps = run(panacea.Hparams(rho=0.7))
    np.testing.assert_allclose(tree.norm(eps), 0.7, rtol=1e-6)
    harmful = toys.sft_gradient(DATA["harmful"])
    np.testing.assert_allclose(tree.cosine(eps, harmful), 1.0, rtol=1e-9)
    assert metrics["gain/harmful"] > 0


def squares(w, center, rng=None):
    """Its gradient is `w - center`."""
    del rng
    return 0.5 * jnp.sum(jnp.square(w - center))


def step(hp):
    """On quadratics: user at (4, 0), harmful at 0, weights (3, 4) of length 5."""
    ctx = types.Context(squares, None, None, hp)
    data = {"user": jnp.array([4.0, 0.0]), "harmful": jnp.zeros(2)}
    w = jnp.array([3.0, 4.0])
    run = jax.jit(lambda *x: panacea.direction(ctx, *x))
    return run(w, data, toys.KEY, jnp.zeros(2))


def test_closed_form():
    """g - lam (w + eps - w) = (-1, 4) - lam eps. Catches a sign, a lam on one part."""
    grads, metrics, eps = step(panacea.Hparams(lam=0.2, rho=2.0, cap=100.0))
    np.testing.assert_allclose(eps, [1.2, 1.6], rtol=1e-7)
    np.testing.assert_allclose(grads, [-1 - 0.24, 4 - 0.32], rtol=1e-7)
    np.testing.assert_allclose(metrics["gain/harmful"], 24.5 - 12.5, rtol=1e-6)


def test_cap_stops_the_look_ahead_only():
    """h(w + eps) = 24.5 > 24: g + lam grad h(w). Catches a cap on h(w), or on both."""
    grads, *_ = step(panacea.Hparams(lam=0.2, rho=2.0, cap=24.0))
    np.testing.assert_allclose(grads, [-1 + 0.6, 4 + 0.8], rtol=1e-7)


def released(hp, steps=2):
    """The weights of a short run and its last state."""
    hp = hp.replace(optimizer=optimizers.Optimizer(1e-2).tabulate(steps))
    method, origin = panacea.method(toys.MODEL), types.Lineage(toys.params())
    state = method.init(origin, hp, toys.KEY)
    one = jax.jit(method.step)
    for _ in range(steps):
        state, _ = one(state, origin, DATA, toys.KEY)
    return method.release(state, origin).params, state


def test_final_shift():
    """w + post * eps, eps of the last step. Catches the first one, and post ignored."""
    params, state = released(panacea.Hparams(rho=0.7, post=0.5))
    shift = jax.tree.map(jnp.subtract, params, state.params)
    np.testing.assert_allclose(tree.norm(shift), 0.35, rtol=1e-6)
    toys.close(shift, jax.tree.map(lambda x: 0.5 * x, state.memory), atol=1e-9)


def test_without_lam_and_post_it_is_sft():
    """The released weights, to rounding. Catches a shift that is always there."""
    params, _ = released(panacea.Hparams(lam=0.0, post=0.0))
    hp = lift.Hparams(optimizers.Optimizer(1e-2).tabulate(2))
    sft, origin = lift.supervised(toys.MODEL, "user"), types.Lineage(toys.params())
    state, one = sft.init(origin, hp, toys.KEY), jax.jit(sft.step)
    for _ in range(2):
        state, _ = one(state, origin, DATA, toys.KEY)
    toys.close(params, state.params, rtol=1e-8, atol=1e-10)


def test_nothing_is_shifted_before_the_first_step():
    """Catches a perturbation that is not zero at first."""
    params, _ = released(panacea.Hparams(), steps=0)
    toys.same(params, toys.params())
