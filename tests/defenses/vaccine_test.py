"""Vaccine: V1 to V6.

Mutants:
  `tree.normalize(gradient_NxBxLxD)` -> `gradient_NxBxLxD`
  `ctx.hp.rho * tree` -> `-ctx.hp.rho * tree`
  `return grads, {` -> `return jax.tree.map(lambda g: 2 * g, grads), {`
  `rng_shifted, site, shift_NxBxLxD` -> `rng_shifted, "resid", shift_NxBxLxD`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.defenses import vaccine
from ftdefense.methods import shifts
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

DATA = {"alignment": batch(1)}


@jax.jit
def ascent(params, rho):
    """The shift at `params`, as the definition says."""
    ctx = common.context(vaccine.Hparams())
    _, g_NxBxLxD = shifts.gradient(ctx, params, DATA["alignment"], None, "attn")
    return rho * g_NxBxLxD / (jnp.linalg.norm(g_NxBxLxD.ravel()) + 1e-7)


def shifted_loss(params, shift_NxBxLxD, site="attn"):
    loss = losses.next_token(common.MODEL)
    hooks = {"intervene": shifts.shift_at(site), "taps": shift_NxBxLxD}
    return loss(params, DATA["alignment"], None, **hooks)


def test_reduces_to_sft():
    """V3: rho = 0, exactly. Catches a clean term beside the shifted one."""
    grads, _ = common.directed(vaccine, vaccine.Hparams(rho=0.0), DATA)
    common.equal(grads, common.sft_gradient(DATA["alignment"]))


@pytest.mark.parametrize("site", vaccine.SITES)
def test_the_shift_has_length_rho(site):
    """V1. Catches a norm per layer."""
    hp = vaccine.Hparams(rho=2.0, site=site)
    _, metrics = common.directed(vaccine, hp, DATA)
    np.testing.assert_allclose(metrics["norm/shift"], 2.0, rtol=1e-5)


def test_the_shift_is_a_constant():
    """V4: equal to a constant shift, unlike one that is differentiated through."""
    grads, _ = common.directed(vaccine, vaccine.Hparams(rho=2.0), DATA)
    w = common.params()
    constant = jax.jit(jax.grad(shifted_loss))(w, ascent(w, 2.0))
    through = jax.jit(jax.grad(lambda w: shifted_loss(w, ascent(w, 2.0))))(w)
    common.close(grads, constant)
    assert tree.norm(jax.tree.map(jnp.subtract, grads, through)) > 1e-6


def test_first_order_rise():
    """V5: the loss rises by rho ||g||. Catches a descent in place of the ascent."""
    _, metrics = common.directed(vaccine, vaccine.Hparams(rho=1e-3), DATA)
    ctx = common.context(vaccine.Hparams())
    _, g = shifts.gradient(ctx, common.params(), DATA["alignment"], None, "attn")
    rise = metrics["loss/shifted"] - metrics["loss/alignment"]
    np.testing.assert_allclose(rise / (1e-3 * tree.norm(g)), 1.0, rtol=1e-2)


def test_the_shift_ends_with_the_answer():
    """V6: zero after the last weighted token, not on the prompt."""
    ctx = common.context(vaccine.Hparams())
    _, g_NxBxLxD = shifts.gradient(
        ctx, common.params(), DATA["alignment"], None, "attn"
    )
    # The last token is padding; the one before it predicts nothing that counts.
    np.testing.assert_array_equal(g_NxBxLxD[:, :, -2:], 0.0)
    # The toy's last layer mixes no positions after the shift; its first does.
    assert np.all(np.abs(g_NxBxLxD[0, :, 0]).max(-1) > 0)
