"""Deep alignment: which tokens precede a refusal, how many, and the one mean.

Mutants:
  `(rows,), 1, most_B + 1)` -> `(rows,), 1, most_B)`
  `jnp.minimum(most_B, hp.max_prefix)` -> `jnp.minimum(most_B, 100)`
  `(most_B > 0), length_B, 0)` -> `(most_B > 0), 0, length_B)`
  `prompt_Bx1 + prefix_B[:, None]` -> `prefix_B[:, None]`
  `in_refusal_BxM & (source_BxM < length)` -> `source_BxM < length`
  `place_1xM - jnp.where(` -> `place_1xM - 0 * jnp.where(`
  `sum(counts[role] * values[role] for` -> `sum(total / 2 * values[role] for`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.defenses import deep_alignment

from ..conftest import batch
from . import common

END, PAD = 9, 0


def rows(*answers):
    """Rows of 8 tokens: the prompt 7 8, an answer, padding."""
    tokens = np.full((len(answers), 8), PAD, np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for i, answer in enumerate(answers):
        tokens[i, : 2 + len(answer)] = [7, 8, *answer]
        weights[i, 2 : 2 + len(answer)] = 1
    return types.Batch(tokens, weights)


HARMFUL = rows([1, 2, 3, END], [4, END], [5, 6, 1, 2, 3, END])
REFUSAL = rows([6, 5, END], [6, 5, 4, 3, 2, END], [6, END])
DATA = {
    "harmful": HARMFUL,
    "refusal": REFUSAL,
    "benign": jax.tree.map(
        lambda *x: np.stack(x), batch(1, length=8), batch(2, length=8)
    ),
}


def spelled(harmful, refusal, prefix, length):
    """The rows written out token by token, without index arithmetic."""
    tokens, weights = np.zeros((len(prefix), length), np.int32), []
    for i, k in enumerate(prefix):
        said = [
            [int(t) for t, w in zip(b.tokens[i], b.weights[i], strict=True) if w]
            for b in (harmful, refusal)
        ]
        row = [7, 8, *said[0][:k], *said[1]]
        tokens[i, : len(row)] = row
        weight = [0.0] * (2 + k) + [1.0] * len(said[1])
        weights.append(weight + [0.0] * (length - len(weight)))
    return types.Batch(tokens, np.asarray(weights, np.float32))


@pytest.mark.parametrize("prefix", [(0, 0, 0), (2, 1, 6), (4, 2, 3)])
def test_rows_are_prompt_prefix_refusal(prefix):
    """Catches a prefix off by one, a lost end token, a prefix that is supervised."""
    made = deep_alignment.recovery(HARMFUL, REFUSAL, jnp.array(prefix), 6)
    wanted = spelled(HARMFUL, REFUSAL, prefix, 14)
    np.testing.assert_array_equal(made.weights, wanted.weights)
    ends = [int(np.flatnonzero(row)[-1]) for row in wanted.weights]
    for mine, theirs, end in zip(made.tokens, wanted.tokens, ends, strict=True):
        np.testing.assert_array_equal(mine[: end + 1], theirs[: end + 1])


def test_a_refusal_that_fills_its_row_is_kept_whole():
    """Catches rows cut at L: three more tokens still fit."""
    refusal = rows([6, 5, 4, 3, 2, END])
    made = deep_alignment.recovery(rows([1, 2, 3]), refusal, jnp.array([3]), 3)
    np.testing.assert_array_equal(made.tokens[0], [7, 8, 1, 2, 3, 6, 5, 4, 3, 2, END])
    np.testing.assert_array_equal(made.weights[0], [0] * 5 + [1] * 6)


@pytest.mark.parametrize(("most", "shares"), [(100, (1 / 3,) * 3), (2, (1 / 2,) * 2)])
def test_prefixes_are_uniform_up_to_the_least_bound(most, shares):
    """k in 1 .. min(max_prefix, |h|), half of the rows. Catches k < |h| and k >= 0."""
    many = rows(*[[1, 2, END]] * 6000)
    hp = deep_alignment.Hparams(max_prefix=most)
    prefix = np.asarray(deep_alignment.draw_prefixes(hp, many, common.KEY))
    counts = np.bincount(prefix, minlength=4) / len(prefix)
    wanted = [0.5, *(0.5 * share for share in shares)]
    np.testing.assert_allclose(counts[: len(wanted)], wanted, atol=0.025)
    assert not np.any(counts[len(wanted) :])
    whether = hp.replace(augment=1.0)
    assert np.all(deep_alignment.draw_prefixes(whether, many, common.KEY) > 0)
    empty = rows(*[[]] * 5)
    assert not np.any(deep_alignment.draw_prefixes(whether, empty, common.KEY))


def gradient_of_one_mean(refusals, anchors):
    """SFT on all rows as one batch: one mean over the tokens of both."""
    longest = refusals.tokens.shape[1]
    anchors = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), anchors)
    anchors = jax.tree.map(
        lambda x: np.pad(x, ((0, 0), (0, longest - x.shape[1]))), anchors
    )
    both = jax.tree.map(lambda *x: np.concatenate(x), refusals, anchors)
    return common.sft_gradient(both)


def test_without_augmentation_it_is_sft():
    """augment = 0. Catches a mean of two means, and a prefix that stays."""
    hp = deep_alignment.Hparams(augment=0.0, anchors=2)
    grads, metrics = common.directed(deep_alignment, hp, DATA)
    common.close(grads, gradient_of_one_mean(REFUSAL, DATA["benign"]), rtol=1e-9)
    assert metrics["share/augmented"] == 0


def test_direction_is_sft_on_the_rows_as_spelled():
    """Also with a cap on the prefix. Catches rows drawn but not used."""
    hp = deep_alignment.Hparams(augment=0.7, max_prefix=3, anchors=2)
    prefix = deep_alignment.draw_prefixes(
        hp, HARMFUL, jax.random.split(common.KEY, 3)[0]
    )
    assert 0 < np.sum(prefix > 0)
    grads, metrics = common.directed(deep_alignment, hp, DATA)
    spelt = spelled(HARMFUL, REFUSAL, [int(k) for k in prefix], 11)
    common.close(grads, gradient_of_one_mean(spelt, DATA["benign"]), rtol=1e-9)
    np.testing.assert_allclose(metrics["share/augmented"], np.mean(prefix > 0))


def test_anchors_are_optional():
    """Catches a role asked for and not used."""
    hp = deep_alignment.Hparams(augment=0.0, anchors=0)
    assert set(deep_alignment.streams(hp)) == {"harmful", "refusal"}
    data = {role: DATA[role] for role in ("harmful", "refusal")}
    grads, _ = common.directed(deep_alignment, hp, data)
    common.close(grads, common.sft_gradient(REFUSAL), rtol=1e-9)
