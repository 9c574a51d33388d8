"""Bilevel: finite differences, the null, what the outer variables do, the split.

Mutants:
  `jnp.where(k == 0, outer["kick"], 0.0)` -> `outer["kick"]`
  `return w - length` -> `return w + length`
  `harm + ctx.hp.gamma * cost, (harm` -> `cost + ctx.hp.gamma * harm, (harm`
  `jnp.exp(b) * cost` -> `jnp.exp(a) * cost`
"""

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import bilevel
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.objectives import losses
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)
K = 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def wide(x):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), x)


def batches(leading=()):
    def stacked(seed, shape):
        count = int(np.prod(shape, dtype=int))
        parts = [batch(seed + i) for i in range(count)]
        found = jax.tree.map(lambda *x: np.stack(x), *parts)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found)

    steps = {"harmful": (0, (*leading, K)), "benign": (20, (*leading, K))}
    judged = {"judged_harmful": (40, leading), "judged_benign": (60, leading)}
    return {role: stacked(*given) for role, given in (steps | judged).items()}


def hparams(**fields):
    optimizer = optimizers.Optimizer(fields.pop("rate", 0.3))
    return bilevel.Hparams(optimizer, inner_steps=K, **fields)


def context(hp):
    hp = hp.replace(optimizer=hp.optimizer.tabulate(4))
    params = wide(MODEL.init(KEY))
    return lift.context(MODEL, types.Lineage(params), hp), params


@pytest.mark.parametrize("inner", bilevel.INNER)
def test_gradient_equals_finite_differences(inner):
    """In every variable. Catches a stop_gradient in the unroll, and a kick, weight or
    rate that is applied elsewhere than where it is differentiated.
    """
    ctx, params = context(hparams(inner=inner, gamma=0.7))
    outer = wide(bilevel.outer_variables(params))
    flat, restore = flatten_util.ravel_pytree(outer)
    flat = flat + 0.3 * jax.random.normal(jax.random.key(5), flat.shape)
    data = batches()

    @jax.jit
    def loss(flat):
        return bilevel.judge(ctx, params, restore(flat), data, KEY)[0]

    grads = jax.jit(jax.grad(loss))(flat)
    h = 1e-4
    steps = h * jnp.eye(flat.size)
    central = [(loss(flat + s) - loss(flat - s)) / (2 * h) for s in steps]
    assert np.all(np.abs(grads) > 1e-6)
    np.testing.assert_allclose(grads, np.array(central), rtol=1e-6, atol=1e-10)


def descended(params, data, weight=1.0, kick=1.0, rates=None):
    """K plain steps of 0.1, the first times `kick`."""
    loss = losses.next_token(MODEL)
    gradient = jax.jit(jax.grad(lambda w, h, c: weight * loss(w, h) + loss(w, c)))
    for k in range(K):
        at = [jax.tree.map(lambda x, k=k: x[k], data[r]) for r in ("harmful", "benign")]
        grads = gradient(params, *at)
        if rates is not None:
            grads = jax.tree.map(jnp.multiply, grads, rates)
        params = tree.add_scale(params, -0.1 * (kick if k == 0 else 1), grads)
    return params


def close(a, b):
    # A schedule in float32 leaves its rounding on the rate.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), a, b
    )


def test_without_outer_steps_it_is_plain_descent():
    """K steps on L_h + L_c. Catches ascent, a kick at 1 and batches out of order."""
    hp = hparams(outer_rate=0.0, inner="sgd", rate=0.1)
    ctx, params = context(hp)
    state = loop.init(METHOD, types.Lineage(params), hp, KEY, 4)
    data = batches()
    state, _ = jax.jit(METHOD.step)(state, types.Lineage(params), data, KEY)
    close(state.params, descended(params, data))


def test_what_each_outer_variable_does():
    """Catches a kick at every step, layers' rates on the wrong axis, and gamma on the
    harmful loss.
    """
    ctx, params = context(hparams(inner="sgd", rate=0.1, gamma=0.7))
    data, outer = batches(), wide(bilevel.outer_variables(params))
    outer["kick"] = jnp.log(2.0)
    outer["weight"]["harmful"] = jnp.log(3.0)
    up = outer["rate"]["layers"]["mix"]["up"]
    up["kernel"] = jnp.log(jnp.array([1.0, 5.0]))
    rates = jax.tree.map(jnp.ones_like, params)
    in_up = rates["layers"]["mix"]["up"]
    in_up["kernel"] = in_up["kernel"].at[1].set(5.0)
    expected = descended(params, data, 3.0, 2.0, rates)
    weights, _ = jax.jit(lambda o: bilevel.unroll(ctx, params, o, data, KEY))(outer)
    close(weights, expected)
    loss = losses.next_token(MODEL)
    harm = loss(expected, data["judged_harmful"])
    cost = loss(expected, data["judged_benign"])
    judged = jax.jit(lambda o: bilevel.judge(ctx, params, o, data, KEY)[0])(outer)
    close(judged, harm + 0.7 * cost)


METHOD = registry.method("attacks", "bilevel", MODEL)


def attacked(hp, data, steps):
    lineage = types.Lineage(wide(MODEL.init(KEY)))
    state = loop.init(METHOD, lineage, hp, KEY, steps)
    return loop.run_chunk(METHOD.step, False, state, lineage, data, KEY, jnp.int32(0))


def test_held_out_loss_falls_and_faster_with_outer_steps():
    """Judged by harm alone, the harmful loss gains weight. Catches outer ascent, swapped
    judges, and outer variables that the K steps do not use.
    """
    steps = 10
    one = batches((steps,))
    same = jax.tree.map(lambda x: np.stack([x[0]] * steps), one)
    rows = same["harmful"]
    same["judged_harmful"] = jax.tree.map(lambda x: x[:, 0], rows)
    fixed = hparams(gamma=0.0, outer_rate=0.0, rate=0.1)
    learned = hparams(gamma=0.0, outer_rate=0.2, rate=0.1)
    (_, plain), (state, metrics) = (
        attacked(hp, same, steps) for hp in (fixed, learned)
    )
    judged = metrics["loss/judged_harmful"]
    assert judged[-1] < 0.9 * judged[0]
    assert judged[-1] < plain["loss/judged_harmful"][-1]
    assert metrics["log/harmful_over_benign"][-1] > 0
    assert np.all(np.abs(flatten_util.ravel_pytree(state.memory)[0]) <= 4.6)


def test_judged_rows_share_no_prompt_with_the_others():
    """Catches a split by rows, which would judge the attack by what it trained on."""
    world = sandbox.build("tiny", 0)
    found = bilevel.derive(MODEL, world, None, bilevel.PRESETS["sandbox"], 0)
    for role in ("harmful", "benign"):
        sides = [{e.key for e in found[p + role].examples} for p in ("", "judged_")]
        assert not sides[0] & sides[1]
        everyone = {e.key for e in world.attacker[role].examples}
        assert sides[0] | sides[1] == everyone
        assert 0.2 < len(sides[1]) / len(everyone) < 0.3
