"""Antibody's alignment: N1, its multipliers, where each gradient is taken.

Mutants:
  `(params), -hp.alpha, tree.normalize(grad_h)` -> `(params), hp.alpha, tree.normalize(grad_h)`
  `-hp.alpha, tree.normalize(grad_h)` -> `-hp.alpha, grad_h`
  `value_and_grad(tampered, batches["refusal"], rng_refusal)` -> `value_and_grad(params, batches["refusal"], rng_refusal)`
  `optax.tree.sub(grad_h, grad_h_after)` -> `optax.tree.sub(grad_h_after, grad_h)`
  `jnp.where(ctx.step == 0, raw, mean)` -> `mean`
  `(1 - hp.momentum) * raw` -> `hp.momentum * raw`
  `jnp.maximum(eta - ratio, 0.0)` -> `jnp.maximum(eta + ratio, 0.0)`
  `jnp.maximum(eta - ratio, 0.0)` -> `eta - ratio`
  `dot / jnp.where(square > 0, square, 1)` -> `dot / jnp.sqrt(jnp.where(square > 0, square, 1))`
  `grads, hp.lam_refusal, grad_r` -> `grads, 1.0, grad_r`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import antibody
from ftdefense.defenses import booster

from ..conftest import batch
from . import common

DATA = {"alignment": batch(1), "harmful": batch(2), "refusal": batch(3)}


def directed(lam=0.0, step=1, **fields):
    memory = {"lam": jnp.float32(lam)}
    return common.directed(
        antibody, antibody.Hparams(**fields), DATA, memory, step=step, steps=9
    )


def parts(alpha):
    """(g_a, g_s, g_r') by their definitions."""
    h = common.sft_gradient(DATA["harmful"])
    ahead = tree.add_scale(common.params(), -alpha / (tree.norm(h) + 1e-7), h)
    h_after = common.sft_gradient(DATA["harmful"], ahead)
    return (
        common.sft_gradient(DATA["alignment"]),
        common.combine((1, h), (-1, h_after)),
        common.sft_gradient(DATA["refusal"], ahead),
    )


def test_reduces_to_sft():
    """alpha = 0 and no refusals. Catches a g_s between two points or two keys."""
    for multiplier in antibody.MULTIPLIERS:
        grads, metrics, _ = directed(
            step=0, alpha=0.0, lam_refusal=0.0, multiplier=multiplier
        )
        common.close(grads, common.sft_gradient(DATA["alignment"]), rtol=1e-13)
        np.testing.assert_allclose(metrics["multiplier/sharpness"], 5.0)


def test_constant_multiplier_is_booster():
    """N1: momentum 1 keeps lam_t. Catches another sign or norm of the step."""
    grads, _, memory = directed(lam=2.5, alpha=0.3, momentum=1.0, lam_refusal=0.0)
    data = {role: DATA[role] for role in ("alignment", "harmful")}
    expected, _ = common.directed(booster, booster.Hparams(lam=2.5, alpha=0.3), data)
    common.close(grads, expected, rtol=1e-10, atol=1e-13)
    assert memory["lam"] == 2.5


def test_refusals_after_the_harmful_step():
    """g_r at w', applied at w. Catches refusals at w, or weighed by lam_t."""
    grads, _, _ = directed(lam=0.0, alpha=0.4, momentum=1.0, lam_refusal=0.7)
    g_a, _, g_r = parts(0.4)
    expected = common.combine((1, g_a), (0.7, g_r))
    common.close(grads, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", antibody.MULTIPLIERS)
def test_the_first_multiplier_is_not_averaged(kind):
    """Then m * last + (1 - m) * raw. Catches exchanged shares, and a mean with zero."""
    g_a, g_s, g_r = parts(0.4)
    raw = antibody.multiplier(g_a, g_s, 5.0, kind)
    fields = {"alpha": 0.4, "momentum": 0.75, "multiplier": kind}
    for step, lam in ((0, raw), (1, 0.75 * 2.0 + 0.25 * raw)):
        grads, _, memory = directed(lam=2.0, step=step, **fields)
        expected = common.combine((1, g_a), (lam, g_s), (0.05, g_r))
        common.close(grads, expected, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(memory["lam"], lam, rtol=1e-6)


def test_multipliers_closed_form():
    """Vectors 3-4-5. Catches a square for a norm, the sign, the missing clamp."""
    a, s = {"x": jnp.array([3.0, 4.0])}, {"x": jnp.array([2.0, 0.0])}
    cosine = antibody.multiplier(a, s, 5.0, "cosine")
    np.testing.assert_allclose(cosine, 5 - 0.6, rtol=1e-8)
    projection = antibody.multiplier(a, s, 5.0, "projection")
    np.testing.assert_allclose(projection, 5 - 1.5, rtol=1e-12)
    for kind in antibody.MULTIPLIERS:
        assert antibody.multiplier(a, s, 0.1, kind) == 0
        still = jax.tree.map(jnp.zeros_like, s)
        assert antibody.multiplier(a, still, 5.0, kind) == 5


def test_multiplier_ranges():
    """N1: cosine in [eta - 1, eta + 1]; the theorem's inequality for the projection."""
    keys = jax.random.split(common.KEY, 20)
    a_nxD, s_nxD = jax.vmap(lambda key: jax.random.normal(key, (2, 5)))(keys).swapaxes(
        0, 1
    )
    for a, s in zip(a_nxD, s_nxD, strict=True):
        assert 4 <= antibody.multiplier(a, s, 5.0, "cosine") <= 6
        lam = antibody.multiplier(a, s, 0.5, "projection")
        assert (a + lam * s) @ s >= 0.5 * s @ s - 1e-9
        if lam > 0:  # Then it holds with equality.
            np.testing.assert_allclose((a + lam * s) @ s, 0.5 * s @ s)


def test_unknown_multiplier():
    """Catches a silent default."""
    with pytest.raises(errors.UserError, match="cosine"):
        antibody.streams(antibody.Hparams(multiplier="cosines"))
