"""CTRAP: X1 and the identities of its section.

Mutants:
  `(params), -alpha, move` -> `(params), alpha, move`
  `tree.normalize(grad) if normalize` -> `grad if normalize`
  `grad_f, hp.lam, grad_collapse` -> `grad_f, 1.0, grad_collapse`
  `collapse_loss(w, retain, rng_collapse)` -> `collapse_loss(w, harmful, rng_collapse)`
  `jax.value_and_grad(judged)(tampered)` -> `jax.value_and_grad(judged)(params)`
"""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.defenses import ctrap
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

DATA = {"retain": batch(1), "harmful": batch(2)}


@jax.jit
def collapse_gradient(weights, token):
    loss = losses.next_token(common.MODEL, losses.toward(token))
    return jax.grad(loss)(weights, DATA["retain"])


def test_reduces_to_sft():
    """lam = 0. Catches a collapse term that lam does not scale."""
    grads, _ = common.directed(ctrap, ctrap.Hparams(lam=0.0), DATA)
    common.equal(grads, common.sft_gradient(DATA["retain"]))


def test_without_a_step_it_collapses_in_place():
    """alpha = 0: retain + lam * collapse at w. Catches a shift of w elsewhere."""
    hp = ctrap.Hparams(lam=0.5, alpha=0.0, collapse_token=3)
    grads, _ = common.directed(ctrap, hp, DATA)
    sft = common.sft_gradient(DATA["retain"])
    expected = common.combine((1, sft), (0.5, collapse_gradient(common.params(), 3)))
    common.close(grads, expected, atol=1e-13)


def test_collapse_is_judged_one_harmful_step_away():
    """First order at w'. Catches the sign of the step, and a raw one."""
    hp = ctrap.Hparams(lam=0.5, alpha=0.2, collapse_token=3)
    grads, _ = common.directed(ctrap, hp, DATA)
    w, h = common.params(), common.sft_gradient(DATA["harmful"])
    ahead = tree.add_scale(w, -0.2 / (tree.norm(h) + 1e-7), h)
    sft = common.sft_gradient(DATA["retain"])
    expected = common.combine((1, sft), (0.5, collapse_gradient(ahead, 3)))
    common.close(grads, expected, rtol=1e-9, atol=1e-12)


def test_second_order_differs_by_the_hessian_term():
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


def test_the_look_ahead_has_length_alpha():
    """Catches a norm per leaf: the displacement is alpha over the whole tree."""
    start = {"a": jnp.ones(3), "b": jnp.full((2,), 2.0)}

    def attacked(w):
        return jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 3)

    def distance(w):
        return tree.norm(jax.tree.map(jnp.subtract, w, start))

    (moved, _), _ = ctrap.look_ahead(attacked, distance, alpha=0.25)(start)
    np.testing.assert_allclose(moved, 0.25, rtol=1e-6)


def test_collapse_loss_of_a_uniform_model():
    """log V. Catches a loss on the true token, or on the prompt's."""
    flat = jax.tree.map(jnp.zeros_like, common.params())
    loss = losses.next_token(common.MODEL, losses.toward(3))
    np.testing.assert_allclose(loss(flat, DATA["retain"]), np.log(11))
