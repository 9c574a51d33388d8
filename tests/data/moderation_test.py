"""The guard of a fine-tuning service."""

import jax
import numpy as np

from ftdefense.data import moderation
from ftdefense.data import pools
from ftdefense.data import sandbox

WORLD = sandbox.build("tiny", 0)
SIZE = len(WORLD.tokenizer)
GUARD = moderation.fit(WORLD, SIZE)


def test_counts_are_of_real_tokens():
    """Catches padding that counts, and a lost end of the answer."""
    pool = pools.Pool(
        np.array([[3, 1, 3, 2, 0, 0]], np.int32),
        np.array([[0, 0, 1, 1, 0, 0]], np.float32),
        "x",
        (),
    )
    np.testing.assert_array_equal(moderation.counts(pool, 5), [[0, 1, 1, 2, 0]])


def test_guards_rows_it_has_not_seen():
    """Entities of the attacker are others. Catches a classifier that knows words by
    heart, and a decision of the wrong sign.
    """
    for side in (WORLD.defender, WORLD.attacker):
        assert moderation.passes(GUARD, side["harmful"]).mean() <= 0.05
        assert moderation.passes(GUARD, side["benign"]).mean() >= 0.95


def test_loss_is_that_of_the_log_odds():
    """-log P(safe), from NumPy. Catches the loss of the other class."""
    counts = moderation.counts(WORLD.attacker["benign"], SIZE)[:5]
    odds = counts @ np.asarray(GUARD.tokens_V) + float(GUARD.bias)
    np.testing.assert_allclose(GUARD.log_odds(counts), odds, rtol=1e-4, atol=1e-4)
    safe = 1 / (1 + np.exp(odds))
    np.testing.assert_allclose(GUARD.loss(counts), -np.log(safe), rtol=1e-3, atol=1e-5)


def test_is_at_its_optimum():
    """Catches a step in the wrong direction, and a penalty that is not there."""

    def loss(guard):
        sides = [
            guard.log_odds(moderation.counts(WORLD.defender[role], SIZE))
            for role in ("harmful", "benign")
        ]
        wrong = jax.nn.softplus(-sides[0]).mean() + jax.nn.softplus(sides[1]).mean()
        return wrong + 1e-3 * (guard.tokens_V**2).sum()

    slope = jax.grad(loss)(GUARD)
    assert np.abs(slope.tokens_V).max() < 2e-3
    assert abs(slope.bias) < 2e-3
