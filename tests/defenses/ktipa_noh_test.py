"""KT-IPA's second stage: K6, K7, and two steps of attack written out.

Mutants:
  `grads, ctx.hp.lam_retain, grad_f` -> `grads, 1.0, grad_f`
  `batches, rng_utility, ctx.reference` -> `batches, rng_utility, lambda t: ctx.model(params, t)`
  `weights, -hp.alpha, tree.normalize(grads)` -> `weights, hp.alpha, tree.normalize(grads)` in methods/ktipa.py
  `-hp.alpha, tree.normalize(grads)` -> `-hp.alpha, grads` in methods/ktipa.py
  `value_and_grad(there, rng_there)` -> `value_and_grad(params, rng_there)` in methods/ktipa.py
  `grads, ctx.hp.gamma, grads_after` -> `grads, 1.0, grads_after` in methods/ktipa.py
  `("heldout_refusal", "benign", "heldout")` -> `("heldout", "benign", "heldout_refusal")` in methods/ktipa.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.defenses import ktipa_noh
from ftdefense.methods import ktipa
from ftdefense.objectives import losses
from ftdefense.objectives import preferences

from ..conftest import batch
from . import common

STEPS = 2
DATA = {
    "adversary": jax.tree.map(lambda *x: np.stack(x), batch(1), batch(2)),
    "heldout": batch(3),
    "heldout_refusal": batch(4),
    "benign": batch(5),
    "retain": batch(6),
}
ROWS = ktipa.labelled(batch(4), batch(5), batch(3))
HP = ktipa_noh.Hparams(alpha=0.3, gamma=0.7, lam_retain=0.0, inner_steps=STEPS)


@jax.jit
def run(hp, weights, start):
    ctx = common.context(hp)
    ctx = ctx._replace(reference=lambda tokens: common.MODEL(start, tokens))
    return ktipa_noh.direction(ctx, weights, DATA, common.KEY)


def points(clamped):
    """(weights, reference): the mean of s over mismatched pairs is below or above 0."""
    near = common.params()
    away = tree.add_scale(near, 0.5, common.params(5))
    return (away, near) if clamped else (near, away)


def directed(clamped=True, **changes):
    hp = jax.tree.map(jnp.asarray, HP.replace(**changes))
    return run(hp, *points(clamped))


@jax.jit
def utility_gradient(weights, start, z0=None):
    """Of KTO, written with `preferences`; z0 frozen if given."""
    rows, desirable = ROWS

    def logps(w, rows):
        return preferences.sequence_logps(common.MODEL(w, rows.tokens), rows)[0]

    others = ktipa.mismatched(rows)
    if z0 is None:
        z0 = jnp.maximum(jnp.mean(logps(weights, others) - logps(start, others)), 0)

    def loss(w):
        s = logps(w, rows) - logps(start, rows)
        return jnp.mean(preferences.kto(s, desirable, z0, 0.1))

    return jax.grad(loss)(weights), z0


def attacked(weights, alpha, steps):
    gradient = jax.jit(jax.grad(losses.next_token(common.MODEL)))

    @jax.jit
    def step(w, g):
        return tree.add_scale(w, -alpha / (tree.norm(g) + 1e-7), g)

    for k in range(steps):
        rows = jax.tree.map(lambda x, k=k: x[k], DATA["adversary"])
        weights = step(weights, gradient(weights, rows))
    return weights


def test_no_look_ahead_is_plain_kto():
    """K6, exact. Catches a look-ahead that gamma does not scale."""
    weights, start = points(True)
    grads, _ = directed(gamma=0.0)
    common.close(grads, utility_gradient(weights, start)[0], rtol=1e-12)
    ctx = common.context(HP)
    ctx = ctx._replace(reference=lambda tokens: common.MODEL(start, tokens))
    loss = ktipa.utility(ctx, ROWS, ctx.reference)
    plain, _ = jax.jit(jax.grad(loss, has_aux=True))(weights, common.KEY)
    common.equal(grads, plain)


@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"inner_steps": 0}])
def test_no_attack_counts_kto_twice(changes):
    """K6: (1 + gamma) times. Catches a difference of gradients in place of a sum."""
    grads, _ = directed(**changes)
    kto, _ = utility_gradient(*points(True))
    common.close(grads, jax.tree.map(lambda g: 1.7 * g, kto), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clamped", [True, False])
def test_look_ahead_written_out(clamped):
    """Two steps; z0 of w' at w'. Catches adversary rows in the utility, and raw steps."""
    weights, start = points(clamped)
    grads, metrics = directed(clamped, lam_retain=0.4)
    there = attacked(weights, 0.3, STEPS)
    here, z0 = utility_gradient(weights, start)
    assert (z0 == 0) == clamped
    after, _ = utility_gradient(there, start)
    sft = common.sft_gradient(DATA["retain"], weights)
    expected = common.combine((1, here), (0.7, after), (0.4, sft))
    common.close(grads, expected, rtol=1e-9, atol=1e-12)
    last = jax.tree.map(lambda x: x[-1], DATA["adversary"])
    before_last = attacked(weights, 0.3, STEPS - 1)
    harmful = losses.next_token(common.MODEL)(before_last, last)
    np.testing.assert_allclose(metrics["loss/harmful"], harmful, rtol=1e-12)


def test_one_step_has_length_alpha():
    """K6. Catches a norm per leaf."""
    weights, hp = common.params(), HP.replace(inner_steps=1)
    there, _ = ktipa.attack(common.context(hp), weights, DATA["adversary"], common.KEY)
    moved = tree.norm(tree.add_scale(there, -1.0, weights))
    np.testing.assert_allclose(moved, 0.3, rtol=1e-6)


def test_attack_is_constant():
    """Catches a missing stop_gradient: no derivative passes the look-ahead."""

    def there(scale):
        weights = jax.tree.map(lambda x: scale * x, common.params())
        ctx = common.context(HP)
        return tree.norm(ktipa.attack(ctx, weights, DATA["adversary"], common.KEY)[0])

    np.testing.assert_array_equal(jax.grad(there)(1.0), 0.0)


@pytest.mark.parametrize("clamped", [True, False])
def test_small_attack_measures_curvature(clamped):
    """K7: (G(w') - G(w)) / -alpha = H ghat where z0 is constant, and misses elsewhere."""
    weights, start = points(clamped)
    alpha = {"alpha": 1e-5, "inner_steps": 1}
    both, _ = directed(clamped, gamma=1.0, **alpha)
    here, z0 = utility_gradient(weights, start)
    change = jax.tree.map(lambda b, h: (b - 2 * h) / -1e-5, both, here)
    first = jax.tree.map(lambda x: x[0], DATA["adversary"])
    ghat = tree.normalize(common.sft_gradient(first, weights))

    def gradient(w):
        return utility_gradient(w, start, z0)[0]

    _, expected = jax.jvp(gradient, (weights,), (ghat,))
    error = tree.norm(tree.add_scale(change, -1.0, expected)) / tree.norm(expected)
    assert (error < 1e-3) if clamped else (error > 5e-3)
