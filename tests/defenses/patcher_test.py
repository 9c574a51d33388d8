"""Patcher: its nulls, its phases and its constant vector, in float64.

Mutants:
  `tree.add_scale(phi, -1.0, start)` -> `tree.add_scale(phi, 1.0, start)`
  `ctx.step > 0` -> `ctx.step >= 0`
  `grads, ctx.hp.alpha, optax` -> `grads, -ctx.hp.alpha, optax`
  `value_and_grad(ctx.loss)(phi, batch, rng)` -> `value_and_grad(ctx.loss)(start, batch, rng)`
  `ctx.loss)(attacked, batch` -> `ctx.loss)(params, batch`
  `x[:, : hp.attack_rows]` -> `x[:, hp.attack_rows :]`
  `hp.attack_rate, hp.attack_steps)` -> `hp.optimizer.learning_rate, hp.attack_steps)`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.defenses import patcher
from ftdefense.methods import alternating
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.objectives import losses

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)
W, A, B = (np.random.default_rng(i).normal(size=5) for i in range(3))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def quadratic(w, center, rng=None):
    """Half the squared distance: its Hessian is the identity."""
    del rng
    return 0.5 * jnp.sum(jnp.square(w - center))


def run(hp, step, w=W):
    """One phase on quadratics: alignment pulls to A, the attack to B."""
    ctx = types.Context(quadratic, None, None, hp, step=jnp.int32(step), steps=3)
    batches = {"alignment": jnp.tile(A, (hp.defend_steps, 1))}
    if hp.attack_steps:
        batches["harmful"] = jnp.tile(B, (hp.attack_steps, 1))
    params, metrics, _ = patcher.phase(ctx, jnp.asarray(w), batches, KEY, None)
    return params, metrics


def plain(**changes):
    optimizer = optimizers.Optimizer(0.1, clip=jnp.inf, kind="sgd").tabulate(3)
    defaults = {"attack_rate": 0.3, "attack_steps": 2, "defend_steps": 4}
    return patcher.Hparams(optimizer, **{**defaults, **changes})


def test_phase_closed_form():
    """v = (0.7^2 - 1)(w - b) of the phase's start, held for all four steps, which lead
    to a - alpha v. Catches the sign of v, another rate, and a v taken anew."""
    params, metrics = run(plain(alpha=0.25), 1)
    v = (0.7**2 - 1) * (W - B)
    goal = A - 0.25 * v
    np.testing.assert_allclose(params, goal + 0.9**4 * (W - goal), rtol=1e-9)
    np.testing.assert_allclose(metrics["norm/vector"], np.linalg.norm(v), rtol=1e-9)


def test_first_phase_is_plain():
    """Loop 1 is SFT. Catches `>=` for `>`."""
    params, metrics = run(plain(), 0)
    np.testing.assert_allclose(params, A + 0.9**4 * (W - A), rtol=1e-12)
    assert metrics["norm/vector"] == 0


def test_alpha_one_sees_only_the_attacked_model():
    """Catches a share that stays with the clean loss."""
    params, _ = run(plain(alpha=1.0), 2)
    goal = A - (0.7**2 - 1) * (W - B)
    np.testing.assert_allclose(params, goal + 0.9**4 * (W - goal), rtol=1e-9)


def test_every_phase_has_a_fresh_optimizer():
    """Adam's first step is the rate, whatever the gradient. Catches kept moments."""
    optimizer = optimizers.Optimizer(1e-3, clip=jnp.inf, eps=0.0).tabulate(3)
    hp = patcher.Hparams(optimizer, attack_steps=0, defend_steps=1)
    w = W
    for step in range(3):
        after, _ = run(hp, step, w)
        np.testing.assert_allclose(after, w - 1e-3 * np.sign(w - A), rtol=1e-12)
        w = after + 100.0 * (-1) ** step


def test_the_schedule_goes_on_within_a_phase():
    """Phase m, step i of 4 has the rate at m + i / 4. Catches the phase's rate for all."""
    table = jnp.asarray([0.0, 1.0, 0.5, 0.0])
    optimizer = optimizers.Optimizer(schedule=table)
    second = alternating.restarted(optimizer, 4, jnp.int32(1)).schedule
    np.testing.assert_allclose(second, [1.0, 0.875, 0.75, 0.625, 0.5])
    whole = alternating.stretched(optimizer, 4).schedule
    np.testing.assert_allclose(whole[:6], [0, 0.25, 0.5, 0.75, 1.0, 0.875])


def wide_params():
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), MODEL.init(jax.random.key(3))
    )


def context(hp):
    return lift.context(MODEL, types.Lineage(wide_params()), hp)


def test_the_attack_takes_some_rows():
    """Two of four, the first. Catches a batch that is shared whole, and steps cut."""
    data = jax.tree.map(lambda *x: jnp.stack(x), batch(1), batch(2))

    @functools.partial(jax.jit, static_argnums=0)
    def vector(rows, data):
        ctx = context(plain(attack_rows=rows))
        return patcher.attack_vector(ctx, wide_params(), data, KEY)[0]

    whole = vector(0, jax.tree.map(lambda x: x[:, :2], data))
    jax.tree.map(np.testing.assert_array_equal, vector(2, data), whole)


def displaced():
    return jax.tree.map(
        lambda x: 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), wide_params()
    )


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (0.5, 0.0), (0.3, 0.0)])
def test_nulls_are_sft_bit_for_bit(alpha, scale):
    """P1: alpha = 0, and v = 0 at any alpha. Catches a share that does not add to one."""
    data = {"alignment": batch(1)}
    vector = jax.tree.map(lambda x: scale * x, displaced())
    hp = patcher.Hparams(alpha=alpha)
    step = jax.jit(lambda w: patcher.direction(context(hp), w, data, KEY, vector)[0])
    grads = step(wide_params())
    sft = jax.jit(jax.grad(losses.next_token(MODEL)))(wide_params(), data["alignment"])
    jax.tree.map(np.testing.assert_array_equal, grads, sft)


def test_gradient_is_that_of_the_surrogate():
    """P1: jax.grad of (1 - alpha) L(w) + alpha L(w + v), v constant. Catches the clean
    point in the second term."""
    data, vector = batch(1), displaced()
    loss = losses.next_token(MODEL)

    def surrogate(w):
        after = jax.tree.map(lambda x, v: x + jax.lax.stop_gradient(v), w, vector)
        return 0.7 * loss(w, data) + 0.3 * loss(after, data)

    expected = jax.grad(surrogate)(wide_params())
    grads, _ = patcher.direction(
        context(patcher.Hparams(alpha=0.3)),
        wide_params(),
        {"alignment": data},
        KEY,
        vector,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15),
        grads,
        expected,
    )


def test_vector_is_float32_for_bfloat16_weights():
    """Steps of 1e-5 vanish in bfloat16. Catches an attack in the weights' own dtype."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide_params())
    ctx = lift.context(MODEL, types.Lineage(narrow), plain())
    data = jax.tree.map(lambda x: jnp.stack([x, x]), batch(1))
    vector, _ = jax.eval_shape(
        lambda p: patcher.attack_vector(ctx, p, data, KEY), narrow
    )
    assert {x.dtype for x in jax.tree.leaves(vector)} == {jnp.dtype("float32")}
