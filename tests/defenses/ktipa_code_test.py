"""KTO of the released code: K1-K5, K9, K10, and a gradient written out row by row.

Mutants:
  `batches["refusal"], batches["benign"]` -> `batches["benign"], batches["refusal"]`
  `places < places.size - undesirable` -> `places >= undesirable` in methods/ktipa.py
  `jnp.roll(x, -1, 0)` -> `jnp.roll(x, 1, 0)` in methods/ktipa.py
  `1 + jnp.argmax` -> `2 + jnp.argmax` in methods/ktipa.py
  `~in_prompt & fits` -> `~in_prompt` in methods/ktipa.py
  `hp.lam_desirable, hp.lam_undesirable` -> `hp.lam_undesirable, hp.lam_desirable` in methods/ktipa.py
  `_logps(frozen, others) - start_others_M` -> `_logps(frozen, rows) - start_M` in methods/ktipa.py
  `x / divisors.get(name, count)` -> `x` in methods/ktipa.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import ktipa_code
from ftdefense.methods import ktipa
from ftdefense.objectives import preferences

from ..conftest import batch
from . import common

DATA = {"refusal": batch(1), "benign": batch(2), "harmful": batch(3)}
HP = ktipa_code.Hparams(beta=0.3, lam_desirable=1.2, lam_undesirable=2.0)


@jax.jit
def run(hp, start, weights):
    ctx = common.context(hp)
    ctx = ctx._replace(reference=lambda tokens: common.MODEL(start, tokens))
    return ktipa_code.direction(ctx, weights, DATA, common.KEY)


def directed(weights, start=None, hp=HP):
    """One compilation for all numbers."""
    start = common.params() if start is None else start
    return run(jax.tree.map(jnp.asarray, hp), start, weights)


def logp(weights, prompt_row, answer_row):
    """Of one answer after one prompt; the test batches' prompts are 2 tokens, answers 3."""
    tokens = np.concatenate([prompt_row[:2], answer_row[2:5]])
    said = jax.nn.log_softmax(common.MODEL(weights, tokens[None]).logits[0])
    return sum(said[t - 1, tokens[t]] for t in range(2, 5))


@jax.jit
def by_hand(weights, start):
    """(z0, gradient of the mean loss with z0 a number), row by row."""
    rows = [row for role in DATA for row in DATA[role].tokens]
    pairs = list(zip(rows, rows[1:] + rows[:1], strict=True))
    apart = [logp(weights, x, y) - logp(start, x, y) for x, y in pairs]
    z0 = jnp.maximum(0.0, sum(apart) / 12)

    def total(w):
        ratios = [logp(w, x, x) - logp(start, x, x) for x in rows]
        losses = [
            HP.lam_desirable * (1 - jax.nn.sigmoid(HP.beta * (s - z0)))
            if i < 8
            else HP.lam_undesirable * (1 - jax.nn.sigmoid(HP.beta * (z0 - s)))
            for i, s in enumerate(ratios)
        ]
        return sum(losses) / 12

    return z0, jax.grad(total)(weights)


def test_at_the_reference():
    """K1: half the weights; slopes -+ lam beta / 4. Catches a mean over tokens."""
    grads, metrics = directed(common.params())
    np.testing.assert_allclose(metrics["loss/kto"], (8 * 0.6 + 4 * 1.0) / 12)
    np.testing.assert_allclose(metrics["gain/reference"], 0.0, atol=1e-12)

    def slopes(w):
        sums = [
            preferences.sequence_logps(common.MODEL(w, rows.tokens), rows)[0].sum()
            for rows in DATA.values()
        ]
        return (-1.2 * (sums[0] + sums[1]) + 2.0 * sums[2]) * 0.3 / 4 / 12

    common.close(grads, jax.jit(jax.grad(slopes))(common.params()), rtol=1e-9)


@pytest.mark.parametrize("swapped", [False, True])
def test_away_from_the_reference(swapped):
    """z0 above and below 0. Catches a wrong partner, and a gradient through z0."""
    pair = common.params(), tree.add_scale(common.params(), 0.5, common.params(5))
    weights, start = pair if swapped else pair[::-1]
    z0, expected = by_hand(weights, start)
    assert (z0 > 0.1) == swapped
    grads, metrics = directed(weights, start)
    np.testing.assert_allclose(metrics["gain/reference"], z0, rtol=1e-9, atol=1e-12)
    common.close(grads, expected, rtol=1e-8, atol=1e-12)


def test_reduces_to_nothing():
    """Catches a term outside the weights."""
    hp = HP.replace(lam_desirable=0.0, lam_undesirable=0.0)
    grads, _ = directed(common.params(5), hp=hp)
    common.equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_golden_values():
    """K2, K3. Catches a sign on the undesirable side."""
    desirable = jnp.array([True, False])
    parts = preferences.kto(jnp.array([3.0, -2.0]), desirable, 1.0, 0.1)
    np.testing.assert_allclose(parts, [0.450166003, 0.425557483], atol=1e-9)
    np.testing.assert_allclose(jnp.mean(parts), 0.437861743, atol=1e-9)
    bound = preferences.kto(jnp.array([-1e4, 1e4]), desirable, 0.0, 0.1, 1.0, 2.0)
    np.testing.assert_allclose(jnp.mean(bound), 1.5)


def test_shift_and_weight_of_an_item():
    """K4, K5. Catches z0 left out, or clamped from above."""
    desirable = jnp.array([True, False])

    def loss(c):
        z0 = preferences.kto_reference(jnp.array([2.0, 1.0]) + c)
        s = jnp.array([3.0, -2.0]) + c
        return jnp.mean(preferences.kto(s, desirable, z0, 0.1))

    np.testing.assert_allclose(loss(7.0), loss(0.0), rtol=1e-12)
    assert abs(loss(-9.0) - loss(0.0)) > 1e-3

    def item(s):
        return jnp.sum(preferences.kto(s[None], jnp.array([True]), 1.0, 0.1, 2.0))

    slope = jax.vmap(jax.grad(item))(jnp.array([1.0, 51.0, 0.0, 2.0]))
    np.testing.assert_allclose(slope[:2], [-0.05, -2 * 6.648057e-4], rtol=1e-6)
    assert np.all(np.abs(slope[2:]) < 0.05)


def test_one_reference_point_for_all_parts():
    """K9. Catches z0 of each microbatch or device, and of one divided by their number."""
    np.testing.assert_allclose(preferences.kto_reference(jnp.full((4, 8), 2.0)), 2.0)
    weights = tree.add_scale(common.params(), 0.5, common.params(5))
    whole, metrics = directed(common.params(), weights)
    parts, same = directed(common.params(), weights, HP.replace(microbatches=3))
    common.close(parts, whole, rtol=1e-9)
    common.close(same, metrics, rtol=1e-9)


def test_mismatched_answers():
    """K10: prompt i, answer i + 1, cut at L. Catches i - 1, and a prompt's end missed."""
    tokens = np.array(
        [[1, 2, 3, 4, 0], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], np.int32
    )
    weights = np.array([[0, 0, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.float32)
    found = ktipa.mismatched(types.Batch(tokens, weights))
    kept = [
        [int(t) for t, w in zip(*rows, strict=True) if w]
        for rows in zip(found.tokens, found.weights, strict=True)
    ]
    assert kept == [[6, 7], [12, 13, 14], [4]]  # 8 and 9 do not fit.
    np.testing.assert_array_equal(found.tokens[0], [1, 2, 3, 6, 7])
    np.testing.assert_array_equal(found.tokens[1, :3], [5, 12, 13])
    np.testing.assert_array_equal(found.tokens[2, :3], [10, 11, 4])
    rows = batch(4)
    answers = ktipa.mismatched(rows).tokens[:, 2:5]
    np.testing.assert_array_equal(answers, np.roll(rows.tokens, -1, 0)[:, 2:5])


def test_saturated_rows_are_counted():
    """Catches a share that is not of all rows, at either end of the utility."""
    far = jax.tree.map(lambda x: 40 * x, common.params(5))
    _, metrics = directed(far, hp=HP.replace(beta=50.0))
    assert 0.5 < metrics["share/saturated"] <= 1.0
    _, metrics = directed(common.params())
    np.testing.assert_allclose(metrics["share/saturated"], 0.0)
