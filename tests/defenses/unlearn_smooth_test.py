"""Unlearn-Smooth: NPO and GradDiff, and the five smoothings.

Mutants:
  `params, hp.rho, tree.normalize(grad)` -> `params, -hp.rho, tree.normalize(grad)` in methods/smoothing.py
  `return lambda params: -jnp.mean` -> `return lambda params: jnp.mean`
  `-2 / ctx.hp.beta` -> `-1 / ctx.hp.beta`
  `jax.nn.log_sigmoid(ctx.hp.beta * gap)` -> `jax.nn.log_sigmoid(-ctx.hp.beta * gap)`
  `-logps_B, weight_B` -> `-logps_B, jnp.mean(weight_B)`
  `average(-logps_B` -> `average(logps_B`
  `jnp.mean(nats(ctx, w, batches` -> `jnp.sum(nats(ctx, w, batches`
  `grad_forget, hp.gamma, grad_retain` -> `grad_forget, 1.0, grad_retain`
  `(step - first) % every == 0` -> `(step - first) % every == 1`
  `bent = product(loss, params, tree.normalize(grad))` -> `bent = product(loss, params, grad)` in methods/smoothing.py
  `product(loss, shifted, unit), product(loss, params, unit)` -> `product(loss, params, unit), product(loss, shifted, unit)` in methods/smoothing.py
  `lambda x: x / hp.draws` -> `lambda x: x` in methods/smoothing.py
"""

import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import unlearn_smooth
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import smoothing
from ftdefense.objectives import losses

from ..conftest import batch
from . import common

DATA = {"harmful": batch(1), "benign": batch(2)}
A = jnp.diag(jnp.array([1.0, 2.0, 5.0]))
T = jnp.array([1.0, -0.5, 0.3])


def directed(**fields):
    hp = unlearn_smooth.Hparams(**fields)
    return common.directed(unlearn_smooth, hp, DATA, None)


def smoothed(loss, at, **fields):
    hp = {"rho": 0.1, "sigma": 0.1, "mu": 0.01, "draws": 3, "shipped": False} | fields
    return smoothing.value_and_grad(
        loss, at, python_types.SimpleNamespace(**hp), common.KEY
    )[1]


def bowl(t):
    return 0.5 * t @ A @ t


def quartic(t):
    return jnp.sum(t**4) + 0.5 * t @ A @ t


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_at_the_reference_is_graddiff(beta):
    """Slope -1 and value 2 ln 2 / beta. Catches a lost factor 2, a swapped sign."""
    grads, metrics, _ = directed(smooth="none", base="npo", beta=beta, gamma=1.5)
    expected = common.combine(
        (-1, common.sft_gradient(DATA["harmful"])),
        (1.5, common.sft_gradient(DATA["benign"])),
    )
    common.close(grads, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics["loss/forget"], 2 * np.log(2) / beta)


def test_graddiff():
    """Catches descent on what is to be forgotten."""
    grads, _, _ = directed(smooth="none", base="graddiff", gamma=0.5)
    expected = common.combine(
        (-1, common.sft_gradient(DATA["harmful"])),
        (0.5, common.sft_gradient(DATA["benign"])),
    )
    common.close(grads, expected, rtol=1e-12)


def test_npo_saturates_as_the_model_forgets():
    """dL/dCE = -2 sigmoid(-beta gap): -0.97501 at gap 0.5, beta 0.1."""
    hp = unlearn_smooth.Hparams(beta=0.1)
    ctx = common.context(hp)
    start = ctx.loss(common.params(), DATA["harmful"])
    ctx = ctx._replace(loss=lambda gap, batch, rng: start + gap)
    slope = jax.grad(unlearn_smooth.forget_loss(ctx, DATA["harmful"], None))(0.5)
    np.testing.assert_allclose(slope, -0.97501, atol=1e-5)


LOSS = jax.jit(losses.next_token(common.MODEL))


def row_gradients(data, weights):
    """SFT gradients and losses of micro-batches of one row."""
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], data) for i in range(4)]
    return [(common.sft_gradient(r, weights), LOSS(weights, r)) for r in rows]


def uneven(seed):
    """Rows of 1 to 3 answer tokens, so that a mean over tokens is another one."""
    data = batch(seed)
    for i in range(3):
        data.weights[i, 3 + i :] = 0
    return data


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("base", unlearn_smooth.BASES)
def test_per_row_is_four_micro_batches_of_one(base, microbatches):
    """mean_i -2 sigmoid(-beta gap_i) grad CE_i, and the retain mean over rows. Catches
    a mean over tokens, and one gap for the batch."""
    data = {"harmful": uneven(1), "benign": uneven(2)}
    at = tree.add_scale(common.params(), 0.4, common.params(7))
    beta, gamma = 2.0, 0.7
    terms = []
    known = row_gradients(data["harmful"], common.params())
    pairs = zip(row_gradients(data["harmful"], at), known, strict=True)
    for (gradient, nats), (_, reference) in pairs:
        slope = 2 / (1 + np.exp(beta * (nats - reference)))
        terms.append((-(slope if base == "npo" else 1) / 4, gradient))
    terms += [
        (gamma / 4, gradient) for gradient, _ in row_gradients(data["benign"], at)
    ]
    hp = {"base": base, "beta": beta, "gamma": gamma, "microbatches": microbatches}
    hp = unlearn_smooth.Hparams(smooth="none", per_row=True, **hp)
    grads, metrics, _ = common.directed(unlearn_smooth, hp, data, None, weights=at)
    common.close(grads, common.combine(*terms), rtol=1e-9, atol=1e-12)
    nats = [nats for _, nats in row_gradients(data["benign"], at)]
    assert abs(metrics["loss/benign"] - np.mean(nats)) < 1e-9
    by_token = np.average(nats, weights=data["benign"].weights.sum(1))
    assert abs(metrics["loss/benign"] - by_token) > 1e-3


def test_published_runs_of_one_row_a_micro_batch():
    """Catches SAM or RS among them, which ran on batches of 4."""
    presets = unlearn_smooth.PRESETS.items()
    assert {name for name, plan in presets if plan.hp.per_row} == {
        "code_npo",
        "code_cr",
        "code_gp",
        "code_wa",
    }


@pytest.mark.parametrize(
    "null", [{"smooth": "sam", "rho": 0.0}, {"smooth": "rs", "sigma": 0.0}]
)
def test_without_smoothing_it_is_npo(null):
    """Catches a shift or noise that its coefficient does not scale."""
    expected, _, _ = directed(smooth="none")
    grads, _, _ = directed(**null)
    common.close(grads, expected, rtol=1e-12, atol=1e-13)


def test_sam_takes_the_gradient_uphill():
    """A (t + rho ghat) on a bowl. Catches descent, and a step of another length."""
    g = A @ T
    expected = A @ (T + 0.1 * g / jnp.linalg.norm(g))
    np.testing.assert_allclose(smoothed(bowl, T, smooth="sam"), expected, rtol=1e-6)


def test_sam_shifts_the_forget_term_alone():
    """Catches a benign gradient away from w."""
    hp = {"base": "graddiff", "rho": 0.3}
    with_retain, _, _ = directed(gamma=2.0, **hp)
    without, _, _ = directed(gamma=0.0, **hp)
    difference = common.combine((1, with_retain), (-1, without))
    expected = common.combine((2.0, common.sft_gradient(DATA["benign"])))
    common.close(difference, expected, rtol=1e-9, atol=1e-12)


def test_gp_adds_the_gradient_of_the_norm():
    """g + rho A g / ||g||. Catches the squared norm; shipped, no penalty at all."""
    g = A @ T
    expected = g + 0.1 * A @ g / jnp.linalg.norm(g)
    np.testing.assert_allclose(smoothed(bowl, T, smooth="gp"), expected, rtol=1e-6)
    np.testing.assert_allclose(smoothed(bowl, T, smooth="gp", shipped=True), g)


def test_cr_is_nothing_on_a_bowl_and_exact_on_a_quartic():
    """Catches a constant unit vector's sign, and a differentiated direction v."""
    np.testing.assert_allclose(smoothed(bowl, T, smooth="cr"), A @ T, atol=1e-9)
    g = jax.grad(quartic)(T)
    v = g / (jnp.linalg.norm(g) + 1e-7)

    def penalised(t):
        return quartic(t) + 0.1 * jnp.linalg.norm(
            jax.grad(quartic)(t + 0.01 * v) - jax.grad(quartic)(t)
        )

    found = smoothed(quartic, T, smooth="cr")
    np.testing.assert_allclose(found, jax.grad(penalised)(T), rtol=1e-5)
    np.testing.assert_allclose(smoothed(quartic, T, smooth="cr", shipped=True), 2 * g)


def test_rs_averages_over_noise():
    """On a bowl the mean gradient is A (t + mean noise). Catches a sum over draws."""
    found = smoothed(bowl, T, smooth="rs", sigma=0.2, draws=2000)
    np.testing.assert_allclose(found, A @ T, atol=0.06)
    assert np.abs(found - A @ T).max() > 1e-4


def test_wa_averages_six_snapshots_of_the_published_run():
    """Steps 100, 105, .., 125 of 125. Catches a lost last one, and unequal weights."""
    hp = unlearn_smooth.Hparams(
        optimizers.Optimizer(1e-3).tabulate(125), smooth="wa", base="graddiff"
    )
    method = unlearn_smooth.method(common.MODEL)
    memory = {"total": jnp.float32(0.0), "count": jnp.int32(0)}
    for step in range(125):
        memory = unlearn_smooth._include(memory, jnp.float32(step), step, hp, 125)
    assert memory["count"] == 5
    state = lift.init_state(jnp.full((2, 2), 125.0), hp, memory)
    state = state.replace(step=jnp.int32(125))
    release = method.release(state, types.Lineage(None))
    np.testing.assert_allclose(release.params, np.mean([100, 105, 110, 115, 120, 125]))


@pytest.mark.parametrize("per_row", [False, True])
def test_rows_without_targets_forget_nothing(per_row):
    """Catches 0 / 0 in the frozen model's nats, and a weight of 0 with an answer."""
    empty = DATA["harmful"].replace(weights=np.zeros_like(DATA["harmful"].weights))
    hp = unlearn_smooth.Hparams(per_row=per_row, gamma=1.0)
    data = {**DATA, "harmful": empty}
    grads, metrics, _ = common.directed(unlearn_smooth, hp, data, None)
    np.testing.assert_allclose(metrics["loss/forget"], 2 * np.log(2) / hp.beta)
    retain = hp.replace(beta=1e-9, smooth="none")
    expected, *_ = common.directed(unlearn_smooth, retain, data, None)
    common.close(grads, expected)


def test_bfloat16_weights_are_shifted_in_float32():
    """Catches a shift that is rounded away: rho is far below the weights' spacing."""
    seen = {}

    def loss(w):
        seen["dtype"] = w.dtype
        return jnp.sum(w * jnp.arange(1.0, 5.0, dtype=w.dtype)) ** 2

    at = jnp.ones(4, jnp.bfloat16)
    found = smoothed(loss, at, smooth="sam", rho=1e-4)
    expected = smoothed(loss, jnp.ones(4, jnp.float32), smooth="sam", rho=1e-4)
    np.testing.assert_array_equal(found, expected)
    assert seen["dtype"] == jnp.float32


def test_a_vanishing_gradient_gives_no_nan():
    """Catches 0 / 0 in the unit vectors."""
    for smooth in smoothing.KINDS[:-1]:
        assert np.all(np.isfinite(smoothed(bowl, 0 * T, smooth=smooth)))
    assert tree.norm(0 * T) == 0
