"""SafeGrad: the surgery, its divergence, its nulls.

Mutants:
      `dot < 0` -> `dot > 0`
      `conflict, -dot /` -> `conflict, dot /`
      `jnp.where(conflict, square, 1)` -> `jnp.sqrt(jnp.where(conflict, square, 1))`
      `_NOISE * tree.norm(grads)` -> `0 * tree.norm(grads)`
      `tree.add_scale(projected, hp.lam, grad_alignment)` -> `tree.add_scale(projected, -hp.lam, grad_alignment)`
      `surgery(grad_user, grad_alignment)` -> `surgery(grad_alignment, grad_user)`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import safegrad
from ftdefense.objectives import divergences

from ..conftest import batch
from . import toy_lineage as toys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


DATA = {"user": batch(1), "alignment": batch(2)}


def run(hp, at=None):
    """The direction at weights `at`; the frozen model is the toy's own."""
    ctx = toys.context(hp)
    fn = jax.jit(lambda p: safegrad.direction(ctx, p, DATA, toys.KEY))
    return fn(at or toys.params())


def test_surgery_closed_form():
    """(1, 0) against (-1, 1) leaves (1/2, 1/2). Catches a sign, a norm for a square."""
    out, conflict = safegrad.surgery(jnp.array([1.0, 0]), jnp.array([-1.0, 1]))
    np.testing.assert_allclose(out, [0.5, 0.5], rtol=1e-12)
    assert conflict


def test_surgery_makes_conflicts_orthogonal():
    """One inner product over the tree. Catches a projection by leaf in its place."""
    a, b = toys.params(1), toys.params(2)
    a = tree.add_scale(a, -0.5, b)
    out, conflict = safegrad.surgery(a, b)
    assert conflict
    np.testing.assert_allclose(
        tree.dot(out, b) / (tree.norm(a) * tree.norm(b)), 0.0, atol=1e-12
    )
    assert abs(jnp.vdot(out["lm_head"]["kernel"], b["lm_head"]["kernel"])) > 1e-3


def test_no_conflict_no_change():
    """Bit for bit, also at g_a = 0 and at rounding. Catches a NaN, and `<=`."""
    g = jnp.array([1.0, 2.0, -0.3])
    agreeing = jnp.array([0.5, 0.1, 0]), jnp.array([2.0, -1, 0])
    for against in (*agreeing, jnp.zeros(3), -1e-6 * g):
        out, conflict = safegrad.surgery(g, against)
        np.testing.assert_array_equal(out, g)
        assert not conflict
    assert safegrad.surgery(g, -1e-4 * g)[1]


@pytest.mark.parametrize("kl", divergences.KINDS)
def test_first_step_is_sft(kl):
    """At the frozen weights there is no divergence. Catches a surgery on rounding."""
    grads, metrics = run(safegrad.Hparams(lam=7.0, kl=kl))
    toys.close(grads, toys.sft_gradient(DATA["user"]))
    assert metrics["conflict/alignment"] == 0
    assert abs(metrics["kl/alignment"]) < 1e-12


def test_divergence_closed_form():
    """Two outcomes: p log p / q + ... Catches exchanged arguments, and a factor."""
    p, q = 0.3, 0.6
    logits = [jnp.log(jnp.array([x, 1 - x])) + 3.0 for x in (p, q)]
    wanted = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(divergences.kullback_leibler(*logits), wanted)


def test_sum_of_both_gradients():
    """Away from the start. Catches a lam inside the surgery, or on the user's part."""
    at = tree.add_scale(toys.params(), 0.5, toys.params(9))
    ctx = toys.context(safegrad.Hparams())
    divergence = divergences.to_reference(ctx.model, ctx.reference)
    g_a = jax.jit(jax.grad(divergence))(at, DATA["alignment"])
    g_u, _ = safegrad.surgery(toys.sft_gradient(DATA["user"], at), g_a)
    grads, _ = run(safegrad.Hparams(lam=0.3), at)
    toys.close(grads, tree.add_scale(g_u, 0.3, g_a))


def test_leaf_projection_differs():
    """Each leaf is orthogonal or unchanged. Catches an option that does nothing."""
    at = tree.add_scale(toys.params(), 0.5, toys.params(9))
    ctx = toys.context(safegrad.Hparams())
    divergence = divergences.to_reference(ctx.model, ctx.reference)
    g_a = jax.jit(jax.grad(divergence))(at, DATA["alignment"])
    g_u = toys.sft_gradient(DATA["user"], at)
    grads, _ = run(safegrad.Hparams(lam=0.0, projection="leaf"), at)
    toys.close(grads, jax.tree.map(lambda u, a: safegrad.surgery(u, a)[0], g_u, g_a))


def test_unknown_option():
    """Catches a silent default."""
    with pytest.raises(errors.UserError, match="forward"):
        safegrad.streams(safegrad.Hparams(kl="forwards"))


def test_frozen_model_stays():
    """Catches a reference that is the model in training: its divergence is zero."""
    at = tree.add_scale(toys.params(), 0.5, toys.params(9))
    _, metrics = run(safegrad.Hparams(), at)
    assert metrics["kl/alignment"] > 1e-3
