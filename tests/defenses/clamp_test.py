"""CLAMP: X3, every term in closed form on a quadratic, and its derivative by differences.

Mutants:
  `weights, -hp.eta, grads)` -> `weights, hp.eta, grads)`
  `v, -hp.eta / hp.probe, difference` -> `v, hp.eta / hp.probe, difference`
  `first - last + tail` -> `last - first + tail`
  `hp.smoothness / 2 *` -> `hp.smoothness *`
  `above - 2 * value + below` -> `above - value + below`
  `jnp.maximum(1 - c, hp.gap)` -> `(1 - c)`
  `hp.curvature - bends_K` -> `bends_K - hp.curvature`
  `-hp.lam_initial * first` -> `hp.lam_initial * first`
  `jnp.maximum(progress - hp.margin, 0.0)` -> `(progress - hp.margin)`
  `jnp.where(square > 0, square, 1.0)` -> `square`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.defenses import clamp
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

CURVES = np.array([1.0, 0.5, 0.1])
START = np.array([0.7, -1.2, 2.0])
DATA = {"retain": batch(1), "harmful": batch(2)}
# Weights of their own, so that no term hides another.
HP = clamp.Hparams(
    lam_long=1.3,
    lam_contraction=0.8,
    lam_curvature=0.6,
    lam_initial=0.4,
    eta=0.3,
    margin=0.05,
    smoothness=2.0,
    inner_steps=3,
)


def quadratic(w):
    return 0.5 * jnp.sum(CURVES * jnp.square(w))


def softplus(x):
    return np.log1p(np.exp(x))


def closed(w, v, hp):
    """All terms for h = w' A w / 2, A = diag(CURVES): numpy alone."""
    a, w, v = (np.asarray(x) for x in (CURVES, w, v))
    values, bends = [], []
    for _ in range(hp.inner_steps):
        values.append(0.5 * (a * w * w).sum())
        u = a * w / np.linalg.norm(a * w)
        bends.append((a * u * u).sum())
        w = w - hp.eta * a * w
    last, slope = 0.5 * (a * w * w).sum(), np.linalg.norm(a * w)
    first = values[0] if values else last
    c = np.linalg.norm((1 - hp.eta * a) * v)
    further = hp.eta * slope / max(1 - c, hp.gap)
    progress = first - last + slope * further + 0.5 * hp.smoothness * further**2
    return {
        "penalty/progress": hp.lam_long * max(progress - hp.margin, 0),
        "penalty/contraction": hp.lam_contraction * softplus(c - hp.contraction),
        "penalty/curvature": hp.lam_curvature
        * softplus(hp.curvature - np.array(bends)).sum(),
        "penalty/initial": -hp.lam_initial * first,
        "rate/contraction": c,
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"inner_steps": 0}, {"margin": 99.0}, {"eta": 1e-3}],
    ids=["all", "no-steps", "within-the-margin", "hardly-contractive"],
)
def test_terms_in_closed_form(changes):
    """Catches a sign, a factor or a missing guard in any term."""
    v = jnp.array([0.6, 0.0, 0.8])
    hp = HP.replace(**changes)
    total, metrics = clamp.immunised(quadratic, START, hp, v)
    expected = closed(START, v, hp)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    terms = [x for name, x in expected.items() if name.startswith("penalty")]
    np.testing.assert_allclose(total, sum(terms), rtol=1e-6)


def test_contraction_of_a_quadratic():
    """X3: c = ||(I - eta A) v||, .7 along the first axis. Catches a step without eta."""
    _, metrics = clamp.immunised(quadratic, START, HP, jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(metrics["rate/contraction"], 0.7, rtol=1e-9)


def test_derivative_is_exact():
    """Against differences of the closed form, u frozen. Catches a first-order shortcut."""
    v = jnp.array([0.6, 0.0, 0.8])

    def total(w, hp):
        return clamp.immunised(quadratic, w, hp, v)[0]

    def numeric(w, hp):
        step = 1e-6
        names = [n for n in closed(w, v, hp) if n.startswith("penalty")]
        ends = [
            [sum(closed(w + s * e, v, hp)[n] for n in names) for s in (step, -step)]
            for e in np.eye(3)
        ]
        return [(a - b) / (2 * step) for a, b in ends]

    # Curvature along u is constant here, but u itself turns: that part is left out.
    hp = HP.replace(lam_curvature=0.0)
    grad = jax.grad(total)(START, hp)
    np.testing.assert_allclose(grad, numeric(START, hp), rtol=1e-6)
    with_curvature = jax.grad(total)(START, HP)
    np.testing.assert_allclose(with_curvature, grad, rtol=1e-6)


def test_flat_loss_has_finite_derivatives():
    """Catches the NaN of a norm at zero."""

    def flat(w):
        return 0.0 * jnp.sum(w)

    grad = jax.grad(lambda w: clamp.immunised(flat, w, HP, START / 3)[0])(START)
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(jax.grad(clamp.length)(jnp.zeros(3)), 0.0)


def test_probe_is_one_random_unit_vector():
    """Catches a unit vector for each leaf, or the same numbers in all of them."""
    v = clamp.direction_of(common.KEY, common.params())
    np.testing.assert_allclose(tree.norm(v), 1.0, rtol=1e-6)
    up, down = (v["layers"]["mix"][n]["kernel"] for n in ("up", "down"))
    assert abs(tree.cosine(up, down)) < 0.5


def test_reduces_to_sft():
    """All weights 0. Catches a term that nothing scales."""
    hp = clamp.Hparams(
        lam_long=0.0, lam_contraction=0.0, lam_curvature=0.0, lam_initial=0.0
    )
    grads, _ = common.directed(clamp, hp, DATA)
    common.close(grads, common.sft_gradient(DATA["retain"]))


def test_adds_the_penalty_on_harmful_rows():
    """Catches roles exchanged, and the sign of the sum."""
    grads, metrics = common.directed(clamp, HP, DATA)
    v = clamp.direction_of(jax.random.split(common.KEY, 3)[2], common.params())
    harmful = losses.next_token(common.MODEL)

    def penalty(w):
        return clamp.immunised(lambda x: harmful(x, DATA["harmful"]), w, HP, v)[0]

    expected = common.combine(
        (1, common.sft_gradient(DATA["retain"])),
        (1, jax.jit(jax.grad(penalty))(common.params())),
    )
    common.close(grads, expected, rtol=1e-8, atol=1e-11)
    assert metrics["loss/attacked"] < metrics["loss/harmful"]
