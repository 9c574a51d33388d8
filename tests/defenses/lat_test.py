"""LAT: the attack on hidden states, the terms under it, and the updates of a step.

Mutants:
  `hooks, jnp.sum(lengths_SxBxL) / count` -> `{}, jnp.sum(lengths_SxBxL) / count`
  `hooks, rng)(params)` -> `{}, rng)(params)`
  `say, avoid = terms(ctx, harmful, refusal, hooks` -> `say, avoid = terms(ctx, refusal, harmful, hooks`
  `pair = terms(ctx, batches["refusal"], batches["harmful"]` -> `pair = terms(ctx, batches["harmful"], batches["refusal"]`
  `return total / (hp.toward + hp.away + hp.keep), metrics` -> `return total, metrics`
  `mask_BxL = seen_BxL == 0` -> `mask_BxL = seen_BxL == 1`
  `jax.lax.stop_gradient(drift) + 1e-8` -> `drift + 1e-8`
  `if hp.restart:` -> `if not hp.restart:`
  `table[state.step]` -> `table[state.step + 1]`
  `step=state.step + 1` -> `step=inner.step`
  `kullback_leibler(logits_BxLxV, start_BxLxV)` -> `kullback_leibler(start_BxLxV, logits_BxLxV)`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import lat
from ftdefense.methods import optimizers
from ftdefense.methods import schedules
from ftdefense.objectives import losses
from ftdefense.objectives import unlikelihood

from ..conftest import batch
from . import common


@functools.cache
def data():
    """Pairs share their prompts; the first answer ends early."""
    found = {"harmful": batch(1), "refusal": batch(2), "benign": batch(3)}
    found["refusal"].tokens[:, :2] = found["harmful"].tokens[:, :2]
    found["harmful"].weights[0, 3:] = 0
    return found


def away():
    return tree.add_scale(common.params(), 0.5, common.params(9))


@jax.jit
def compiled(weights, hp):
    return lat.direction(common.context(hp), weights, data(), common.KEY)


def run(weights=None, **settings):
    settings = {"inner_steps": 2, **settings}
    hp = jax.tree.map(float, lat.Hparams(**settings))
    return compiled(common.params() if weights is None else weights, hp)


def term(role, loss=losses.cross_entropy):
    return lambda w: losses.next_token(common.MODEL, loss)(w, data()[role])


def avoid(role):
    return term(role, unlikelihood.unlikelihood)


def test_without_a_shift():
    """epsilon = 0: toward, away and benign, weights summing to 1. Catches their roles."""

    def loss(w):
        return 0.2 * term("refusal")(w) + 0.2 * avoid("harmful")(w)

    expected = jax.jit(jax.grad(lambda w: loss(w) + 0.6 * term("benign")(w)))(away())
    grads, metrics = run(away(), epsilon=0.0)
    common.close(grads, expected, rtol=1e-9, atol=1e-12)
    assert metrics["norm/latents"] == 0


def test_benign_term_knows_no_shift():
    """toward = away = 0: SFT, whatever the attack. Catches hooks on benign rows."""
    grads, metrics = run(away(), toward=0.0, away=0.0)
    sft = common.sft_gradient(data()["benign"], away())
    common.close(grads, sft, rtol=1e-9, atol=1e-12)
    assert metrics["norm/latents"] > 0


def attacked(answers=False):
    """Mask by hand: prompts have two tokens, answers three but one."""
    mask = np.zeros((4, 6, 1))
    mask[:, : 5 if answers else 2] = 1
    return jnp.asarray(mask)


@pytest.mark.parametrize("answers", [False, True])
def test_one_attack_step_by_hand(answers):
    """A step of AdamW from 0 is the sign of the gradient. Catches whom it serves."""
    mask, weights = attacked(answers), away()

    def hooks(shift):
        def intervene(hidden, site, layer, tap):
            if site == "embed":
                return hidden + shift["embed"] * mask
            if site == "mlp":
                return hidden + shift["mlp"][layer] * mask
            return hidden

        return {"intervene": intervene, "taps": None}

    def loss(w, shift, say, unlikely):
        wanted = losses.next_token(common.MODEL)(w, data()[say], **hooks(shift))
        bad = losses.next_token(common.MODEL, unlikelihood.unlikelihood)
        return 0.5 * wanted + 0.5 * bad(w, data()[unlikely], **hooks(shift))

    @jax.jit
    def expected(w):
        start = {"embed": jnp.zeros((4, 6, 8)), "mlp": jnp.zeros((2, 4, 6, 8))}
        g = jax.grad(loss, argnums=1)(w, start, "harmful", "refusal")
        shift = jax.tree.map(lambda x: -0.05 * x / (jnp.abs(x) + 1e-8), g)

        def cut(x):
            norm = jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-300)
            return x / jnp.maximum(norm / 0.1, 1)

        shift = jax.tree.map(cut, shift)
        return jax.grad(loss)(w, shift, "refusal", "harmful"), shift

    wanted, shift = expected(weights)
    settings = {"inner_steps": 1, "epsilon": 0.1, "keep": 0.0, "answers": answers}
    grads, metrics = run(weights, **settings)
    common.close(grads, wanted, rtol=1e-6, atol=1e-9)
    length = jnp.sum(jnp.linalg.norm(shift["mlp"], axis=-1)) / (2 * mask.sum())
    np.testing.assert_allclose(metrics["norm/latents"], length, rtol=1e-6)


def test_divergence_has_unit_scale():
    """K's gradient is D's over D. Catches the other direction, or no stop-gradient."""

    def drift(w):
        logits = common.MODEL(w, data()["benign"].tokens).logits
        base = common.MODEL(common.params(), data()["benign"].tokens).logits
        p, p_0 = jax.nn.log_softmax(logits), jax.nn.log_softmax(base)
        nats = jnp.sum(jnp.exp(p) * (p - p_0), -1)[:, 2:5]
        return jnp.mean(nats) / 11

    value, grad = jax.jit(jax.value_and_grad(drift))(away())
    settings = {"benign": "kl", "toward": 0.0, "away": 0.0, "inner_steps": 1}
    grads, metrics = run(away(), **settings)
    common.close(grads, jax.tree.map(lambda g: g / (value + 1e-8), grad), 1e-8, 1e-11)
    np.testing.assert_allclose(metrics["divergence/benign"], 11 * value, rtol=1e-9)
    still, _ = run(**settings)
    assert tree.norm(still) < 1e-6


@pytest.mark.parametrize("restart", [True, False])
def test_updates_of_a_step(restart):
    """Two steps of two AdamW updates at one attack and rate each, by hand.

    Catches moments that outlive a restart, or die without one; a rate a step off.
    """
    schedule = schedules.Schedule(floor=0.25, decay="linear")
    optimizer = optimizers.Optimizer(0.01, schedule, clip=float("inf"))
    hp = lat.Hparams(optimizer.tabulate(4), epsilon=0.0, inner_steps=1, updates=2)
    hp = jax.tree.map(jnp.asarray, hp.replace(restart=restart, keep=1.0))
    method, origin = lat.method(common.MODEL), types.Lineage(away())
    state = method.init(origin, hp, common.KEY)
    step = jax.jit(method.step)

    def loss(w):
        total = 0.5 * term("refusal")(w) + 0.5 * avoid("harmful")(w)
        return (total + term("benign")(w)) / 2

    gradient = jax.jit(jax.grad(loss))
    w, adam = away(), optax.scale_by_adam()
    moments = adam.init(w)
    for i, rate in enumerate((1.0, 1 - 0.75 / 4)):
        state, _ = step(state, origin, data(), common.KEY)
        moments = adam.init(w) if restart else moments
        for _ in range(2):
            moved, moments = adam.update(gradient(w), moments)
            w = tree.add_scale(w, -0.01 * rate, moved)
        assert state.step == i + 1
    common.close(state.params, w, rtol=1e-7, atol=1e-9)
    common.equal(state.hp.optimizer.schedule, hp.optimizer.schedule)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"microbatches": 2}, "microbatches"),
        ({"benign": "lk"}, "kl"),
        ({"updates": 0}, "updates"),
    ],
)
def test_what_it_cannot_do(settings, match):
    """Catches a setting that is silently ignored."""
    with pytest.raises(errors.UserError, match=match):
        lat.streams(lat.Hparams(**settings))
