"""MLAC, M1: finite differences, idle adversary, second order, calibration, rates.

Mutants:
  `grad_f, -ctx.hp.lam, grad_h` -> `grad_f, ctx.hp.lam, grad_h`
  `grad_f, -ctx.hp.lam, grad_h` -> `grad_f, -1.0, grad_h`
  `log_rates, -ctx.hp.rate_step, grad_rates` -> `log_rates, ctx.hp.rate_step, grad_rates`
  `optimizers.clip(1.0)` -> `optimizers.clip(9.0)`
  `grads = jax.grad(ctx.loss)(optax` -> `grads = jax.lax.stop_gradient(jax.grad(ctx.loss))(optax`
  `w - jnp.exp(log_rate) * move` -> `w + jnp.exp(log_rate) * move`
  `judge(ctx, there, batches["heldout"]` -> `judge(ctx, params, batches["heldout"]`
  `jnp.mean(judged_K), judged_K[-1]` -> `judged_K[-1], judged_K[-1]`
  `heldout, ctx.hp.calibration` -> `heldout, "none"`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import mlac
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

K, KEY = 3, common.KEY
LOSS = losses.next_token(common.MODEL)


def stack(count, seed):
    parts = [batch(seed + i) for i in range(count)]
    return jax.tree.map(lambda *x: np.stack(x), *parts)


DATA = {"adversary": stack(K, 10), "heldout": batch(20), "retain": batch(30)}


@jax.jit
def run(hp, weights, log_rates, data):
    ctx = common.context(hp)
    return mlac.direction(ctx, weights, data, KEY, log_rates)


def rates_of(rate):
    log_rate = jnp.log(jnp.asarray(rate, jnp.float64))
    return jax.tree.map(lambda _: log_rate, common.params())


def directed(weights=None, log_rates=None, rate=0.05, lam=1.0, **settings):
    """A large epsilon keeps Adam's second derivative moderate."""
    weights = common.params() if weights is None else weights
    hp = mlac.Hparams(lam=lam, eps_root=1e-4, inner_steps=K, **settings)
    if log_rates is None:
        log_rates = rates_of(rate)
    return run(jax.tree.map(jnp.asarray, hp), weights, log_rates, DATA)


def objective(*args):
    _, metrics, _ = directed(*args)
    return metrics["loss/retain"] - metrics["loss/attacked"]


def test_gradient_is_that_of_the_whole_objective():
    """M1. Catches a gradient stopped at a step, and first order."""
    grads, _, _ = directed()
    weights, change = common.params(), common.params(77)
    ends = [objective(tree.add_scale(weights, e, change)) for e in (1e-5, -1e-5)]
    slope = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(tree.dot(grads, change), slope, rtol=1e-6)


def test_adversary_learns_faster_rates():
    """Its log-rates go down the slope of its mean loss, by at most `rate_step`."""
    rates = rates_of(0.05)
    _, before, after = directed(rate_step=0.3)
    change = jax.tree.map(jnp.subtract, after, rates)
    ends = [
        -objective(None, tree.add_scale(rates, e / tree.norm(change), change))
        for e in (1e-5, -1e-5)
    ]
    slope = (ends[0] - ends[1]) / 2e-5
    # Along the gradient itself the slope is minus its norm; the step is not clipped yet.
    np.testing.assert_allclose(slope, -tree.norm(change) / 0.3, rtol=1e-5)
    np.testing.assert_allclose(before["rate/adversary"], 0.05, rtol=1e-6)


def test_rates_move_by_the_clipped_gradient():
    """A steep slope. Catches a step that is not clipped."""
    weights = common.params()
    weights["lm_head"] = jax.tree.map(lambda x: 30 * x, weights["lm_head"])
    rates = rates_of(0.3)
    _, _, after = directed(weights, rates, calibration="none")
    moved = tree.norm(jax.tree.map(jnp.subtract, after, rates))
    np.testing.assert_allclose(moved, 0.01, rtol=1e-4)


def test_idle_adversary_is_gradient_difference():
    """M1, rate 0: grad L_d - lam grad L_h. Catches another factor or held-out batch."""
    grads, metrics, after = directed(rate=0.0, lam=0.7, calibration="none")
    expected = common.combine(
        (1.0, common.sft_gradient(DATA["retain"])),
        (-0.7, common.sft_gradient(DATA["heldout"])),
    )
    common.close(grads, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(
        metrics["loss/attacked"], LOSS(common.params(), DATA["heldout"]), rtol=1e-12
    )
    assert all(rate == -np.inf for rate in jax.tree.leaves(after))


def test_reduces_to_sft():
    """lam = 0. Catches a term that lam does not scale."""
    grads, _, _ = directed(lam=0.0)
    common.close(grads, common.sft_gradient(DATA["retain"]))


def test_calibration_takes_back_what_confidence_hides():
    """At most ln V, however wrong. Catches the raw loss."""
    weights = common.params()
    weights["lm_head"] = jax.tree.map(lambda x: -30 * x, weights["lm_head"])
    _, raw, _ = directed(weights, rate=0.0, calibration="none")
    _, calibrated, _ = directed(weights, rate=0.0)
    assert raw["loss/attacked"] > 10
    assert calibrated["loss/attacked"] <= np.log(11) + 1e-9


def test_two_steps_of_sgd_in_closed_form():
    """1/2 (I - rate H0) (grad l(w1) + (I - rate H1) grad l(w2)).

    Catches first order, and the last loss in place of the mean.
    """
    weights, rate = common.params(), 0.2
    hp = mlac.Hparams(inner_steps=2, adversary="sgd", calibration="none")
    data = {**DATA, "adversary": stack(2, 10)}
    gradient, judged = jax.grad(LOSS), jax.value_and_grad(LOSS)

    def back(w, rows, v):
        _, product = jax.jvp(lambda w: gradient(w, rows), (w,), (v,))
        return tree.add_scale(v, -rate, product)

    @jax.jit
    def both(weights):
        ctx = common.context(hp)
        grads, metrics, _ = mlac.direction(ctx, weights, data, KEY, rates_of(rate))
        first = tree.add_scale(weights, -rate, gradient(weights, batch(10)))
        second = tree.add_scale(first, -rate, gradient(first, batch(11)))
        pairs = [judged(w, DATA["heldout"]) for w in (first, second)]
        values, ends = zip(*pairs, strict=True)
        ahead = common.combine((1.0, ends[0]), (1.0, back(first, batch(11), ends[1])))
        through = back(weights, batch(10), ahead)
        kept = gradient(weights, DATA["retain"])
        straight = common.combine((1.0, ends[0]), (1.0, ends[1]))
        return grads, metrics, jnp.stack(values), kept, through, straight

    grads, metrics, values, kept, through, straight = both(weights)
    np.testing.assert_allclose(metrics["loss/attacked"], values.mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["loss/attacked_last"], values[1], rtol=1e-12)
    expected = common.combine((1.0, kept), (-0.5, through))
    common.close(grads, expected, rtol=1e-9, atol=1e-12)
    assert tree.norm(jax.tree.map(jnp.subtract, through, straight)) > 1e-2


def test_user_errors():
    """Catches a fall-back, and a mean over no steps."""
    with pytest.raises(errors.UserError, match="adam"):
        mlac.streams(mlac.Hparams(adversary="adamw"))
    with pytest.raises(errors.UserError, match="at least 1"):
        mlac.streams(mlac.Hparams(inner_steps=0))
