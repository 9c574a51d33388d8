"""TAR: R1 (range, null adversaries, weights, count), a plain loop, switch, phases.

Mutants:
  `(k - (hp.inner_steps - 1))` -> `(k - hp.inner_steps)`
  `jnp.where(k < switch, r, f)` -> `jnp.where(k > switch, r, f)`
  `hp.lam / hp.tasks *` -> `hp.lam *`
  `value_and_grad(objective)(` -> `value_and_grad(lambda *a: -objective(*a))(`
  `hp.lam_retain * r + t + m` -> `hp.lam_retain * (r + t) + m`
  `~mapping, lambda` -> `mapping, lambda`
  `value >= hp.bound` -> `value <= hp.bound`
  `x[1:].reshape(hp.tasks` -> `x[:-1].reshape(hp.tasks`
  `(start, total), xs)` -> `(start, jax.tree.map(jnp.zeros_like, total)), xs)`
  `p_BxLxV * logps_BxLxV` -> `logps_BxLxV` in objectives/resistance.py
  `return jnp.mean(jnp.where(apart, jnp.sqrt(` -> `return jnp.mean(jnp.where(apart, (` in objectives/representations.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import tar
from ftdefense.methods import phases
from ftdefense.objectives import losses
from ftdefense.objectives import representations
from ftdefense.objectives import resistance

from ..conftest import batch
from . import common

MODEL = common.MODEL
ATTACK = {"tasks": 2, "inner_steps": 7, "every": 3, "learning_rates": (1e-2,)}


def stack(*leading, seed):
    count = int(np.prod(leading))
    parts = [batch(seed + i) for i in range(count)]
    return jax.tree.map(lambda *x: np.stack(x).reshape(*leading, *x[0].shape), *parts)


@jax.jit
def run(hp, weights, found, step, steps):
    ctx = common.context(hp)._replace(step=step, steps=steps)
    return tar.direction(ctx, weights, found, common.KEY)


def directed(hp, found, weights=None, step=0, steps=0):
    """One compilation for all numbers."""
    hp = jax.tree.map(jnp.asarray, hp)
    weights = common.params() if weights is None else weights
    return run(hp, weights, found, step, steps)


def data(tasks=2, steps=7):
    return {
        "adversary": stack(tasks, max(steps, 1), seed=100),
        "heldout": stack(tasks, seed=200),
        "heldout_refusal": stack(tasks, seed=300),
        "retain": stack(1 + tasks * steps, seed=400),
    }


def at(batches, *index):
    return jax.tree.map(lambda x: x[index], batches)


def entropy_gradient(weights, heldout):
    def loss(w):
        return resistance.negative_entropy(MODEL(w, heldout.tokens).logits)

    return jax.grad(loss)(weights)


def retain_gradient(weights, rows, lam_hidden=1.0):
    def loss(w):
        outputs = MODEL(w, rows.tokens)
        there = MODEL(common.params(), rows.tokens)
        layers = zip(
            representations.all_layers(outputs),
            representations.all_layers(there),
            strict=True,
        )
        moved = [jnp.mean(jnp.linalg.norm(a - b, axis=-1)) for a, b in layers]
        moved = sum(moved) / len(moved) if lam_hidden else 0.0
        return losses.next_token(MODEL)(w, rows) + lam_hidden * moved

    return jax.grad(loss)(weights)


def adamw(weights, batches, lr, decay=0.01):
    """PyTorch's AdamW, one step a batch; yields the weights after each."""
    gradient = jax.jit(jax.grad(losses.next_token(MODEL)))
    m = v = jax.tree.map(jnp.zeros_like, weights)
    for t, rows in enumerate(batches, 1):
        g = gradient(weights, rows)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        c, d = 1 - 0.9**t, 1 - 0.999**t
        weights = jax.tree.map(
            lambda w, m, v, c=c, d=d: (
                w * (1 - lr * decay) - lr * (m / c) / (jnp.sqrt(v / d) + 1e-8)
            ),
            weights,
            m,
            v,
        )
        yield weights


def test_resistance_lies_between_zero_and_minus_log_vocabulary():
    """R1. Catches a sum over positions, or p in place of p log p."""
    uniform = resistance.negative_entropy(jnp.zeros((2, 3, 11)))
    np.testing.assert_allclose(uniform, -np.log(11), rtol=1e-12)
    sure = resistance.negative_entropy(1e3 * jnp.eye(11)[None])
    np.testing.assert_allclose(sure, 0.0, atol=1e-12)
    logits = MODEL(common.params(), batch(1).tokens).logits
    assert -np.log(11) < resistance.negative_entropy(logits) < 0


def test_null_adversary_leaves_weighted_gradients_at_the_start():
    """R1, inner rate 0: lam (w_2 + w_5) grad L_TR(w). Catches weights and their count."""
    found = data()
    hp = tar.Hparams(**{**ATTACK, "learning_rates": (0.0,)}, lam=4.0, lam_hidden=0.0)
    grads, _ = directed(hp, found)
    factor = 4 * (np.exp(0.0625 * (2 - 6)) + np.exp(0.0625 * (5 - 6)))
    expected = common.combine(
        (1.0, common.sft_gradient(at(found["retain"], 0))),
        *(
            (factor / 2, entropy_gradient(common.params(), at(found["heldout"], t)))
            for t in range(2)
        ),
    )
    common.close(grads, expected, rtol=1e-6, atol=1e-8)


def test_no_inner_steps_leave_the_retain_gradient():
    """R1, K = 0. Catches a resistance gradient taken before the first attack step."""
    weights, found = common.params(5), data(tasks=1, steps=0)
    hp = tar.Hparams(inner_steps=0)
    grads, _ = directed(hp, found, weights)
    expected = retain_gradient(weights, at(found["retain"], 0))
    common.close(grads, expected, rtol=1e-9, atol=1e-12)


def test_reduces_to_sft_on_the_first_retain_batch():
    """Catches a term outside lam and lam_hidden, and another retain batch."""
    found = data()
    hp = tar.Hparams(**ATTACK, lam=0.0, lam_hidden=0.0)
    grads, _ = directed(hp, found)
    expected = common.sft_gradient(at(found["retain"], 0))
    common.close(grads, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("switch_share", [0.0, 1.0])
def test_equals_a_plain_loop_over_two_tasks(switch_share):
    """Catches weight decay, moments that outlive a task, a switch the wrong way."""
    weights, found = common.params(5), data()
    # Beta(6e6, 3e6) is 2/3: the adversary switches after floor(7 * 2 / 3) = 4 steps.
    hp = tar.Hparams(**ATTACK, switch_share=switch_share, switch_a=6e6, switch_b=3e6)
    grads, metrics = directed(hp, found, weights=weights)
    total = retain_gradient(weights, at(found["retain"], 0))
    value = 0.0
    for task in range(2):
        rows = [
            at(found["retain"], 1 + 7 * task + k)
            if switch_share and k < 4
            else at(found["adversary"], task, k)
            for k in range(7)
        ]
        heldout = at(found["heldout"], task)
        for k, attacked in enumerate(adamw(weights, rows, 1e-2)):
            if k in (2, 5):
                weight = 4 / 2 * np.exp(0.0625 * (k - 6))
                total = tree.add_scale(
                    total, weight, entropy_gradient(attacked, heldout)
                )
                logits = MODEL(attacked, heldout.tokens).logits
                value += weight * resistance.negative_entropy(logits)
    np.testing.assert_allclose(metrics["loss/resistance"], value, rtol=1e-6)
    common.close(grads, total, rtol=1e-5, atol=1e-7)


def test_below_the_bound_only_retain_is_left():
    """Catches the comparison the other way round."""
    weights, found = common.params(5), data()
    for bound, free in ((0.0, False), (-1e3, True)):
        hp = tar.Hparams(**ATTACK, bound=bound)
        _, metrics = directed(hp, found, weights=weights)
        assert (metrics["norm/resistance"] > 0) == free


def test_dpo_prefers_refusals_from_log_two_on():
    """Catches a swapped pair, and a reference that moves with the weights."""
    found = at({k: v for k, v in data().items() if "held" in k}, 0)
    ctx = common.context(tar.Hparams(microbatches=1))
    loss = resistance.dpo(ctx, found["heldout"], found["heldout_refusal"], 0.1)
    start = common.params()
    value, grads = jax.value_and_grad(loss)(start, None)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-12)
    after = tree.add_scale(start, -0.1, grads)

    def margin(w):
        sums = [
            losses.weighted_sums(MODEL(w, rows.tokens), rows)[0]
            for rows in (found["heldout"], found["heldout_refusal"])
        ]
        return sums[0] - sums[1]

    assert margin(after) > margin(start)
    halves = common.context(tar.Hparams(microbatches=2))
    again = resistance.dpo(halves, found["heldout"], found["heldout_refusal"], 0.1)
    np.testing.assert_allclose(again(after, None), loss(after, None), rtol=1e-12)


@pytest.mark.parametrize(("step", "mapped"), [(2, True), (3, False)])
def test_first_phase_is_random_mapping(step, mapped):
    """0.1 of 30 steps are 3. Catches phases that overlap, swap or count 4."""
    hp = tar.Hparams(**ATTACK, mapping_share=0.1)
    _, metrics = directed(hp, data(), step=step, steps=30)
    assert (metrics["loss/mapping"] > 0) == mapped
    assert (metrics["loss/resistance"] < 0) == (not mapped)


def test_a_part_that_is_off_costs_nothing():
    """Catches `where`: a loop of no turns never evaluates its body."""
    calls = []

    def compute():
        jax.debug.callback(lambda: calls.append(1))
        return jnp.ones(3)

    run = jax.jit(lambda active: phases.only_if(active, compute))
    np.testing.assert_array_equal(run(jnp.array(False)), 0.0)
    jax.effects_barrier()
    assert not calls
    np.testing.assert_array_equal(run(jnp.array(True)), 1.0)
    jax.effects_barrier()
    assert len(calls) == 1


def test_distance_is_flat_at_the_reference():
    """Catches the NaN of a norm at zero, and a squared norm (2 in place of 1)."""
    outputs = MODEL(common.params(), batch(1).tokens)

    def distance(shift):
        moved = jax.tree.map(lambda h: h + shift, outputs.hidden)
        return representations.distance(outputs.replace(hidden=moved), outputs)

    np.testing.assert_array_equal(jax.grad(distance)(0.0), 0.0)
    np.testing.assert_allclose(distance(0.5), 0.5 * np.sqrt(8), rtol=1e-12)
    np.testing.assert_allclose(distance(1.0), np.sqrt(8), rtol=1e-12)


def test_unknown_objective_is_a_user_error():
    """Catches a fall-back to entropy."""
    with pytest.raises(errors.UserError, match="entropy"):
        tar.streams(tar.Hparams(objective="entropie"))
