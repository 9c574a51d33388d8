"""Virus: objective and slope against their formulas, what the search may not do, rows.

Mutants:
  `hp.lam * guard.loss(counts_V) - (1 - hp.lam) * along` -> `hp.lam * guard.loss(counts_V) + (1 - hp.lam) * along`
  `tree.dot(tree.normalize(gradient(tokens_L)), wanted)` -> `tree.dot(gradient(tokens_L), wanted)`
  `(factors,), (wanted,))[1]` -> `(factors,), (wanted,))[0]`
  `weights[i, start : len(row)] = 1` -> `weights[i, start + len(segment) : len(row)] = 1`
  `(1 - hp.lam) * along` -> `along`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import virus
from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import chat
from ftdefense.data import moderation
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.methods import adapters
from ftdefense.models import toy
from ftdefense.objectives import losses

WORLD = sandbox.build("tiny", 0)
SIZE = len(WORLD.tokenizer)
MODEL = toy.Toy(vocab=SIZE)
PARAMS = MODEL.init(jax.random.key(0))
GUARD = moderation.fit(WORLD, SIZE)
TARGETS = ("up", "down")
DATA = recipes.Recipe(sample_count=20, poison_ratio=0.2, filler="benign")


def planned(data=DATA, **fields):
    plan = virus.PRESETS["sandbox"]
    fields = {"targets": TARGETS, "epochs": 3, **fields}
    return dataclasses.replace(plan, hp=plan.hp.replace(**fields), data=data)


def rows():
    side = WORLD.attacker
    return virus.carried(
        WORLD, side["harmful"].examples[:4], side["benign"].examples[:4]
    )


def found(monkeypatch, lam, params=PARAMS, **fields):
    """What a search of the first row hands to the descent: value, slope, tokens."""
    seen = {}

    def descend(tokens, free, rng, value, slope, **options):
        seen.update(value=value, slope=slope, tokens=tokens, free=free)
        return tokens, None, None

    monkeypatch.setattr(virus.exchanges, "descend", descend)
    pool, free = rows()
    row = virus.Row(*(jnp.asarray(x[0]) for x in (pool.tokens, pool.weights, free)))
    hp = planned(lam=lam, **fields).hp
    allowed = jnp.ones(SIZE, bool)
    virus.search(MODEL, params, GUARD, allowed, hp, row, jax.random.key(0))
    return row, seen


def gradient(row, tokens):
    rng_factors, _ = jax.random.split(jax.random.key(0))
    adapter = adapters.LoRA(alpha=4.0, rank=4, targets=TARGETS)
    loss = losses.next_token(adapter.bind(MODEL, PARAMS))
    factors = adapter.init(PARAMS, rng_factors)
    return jax.grad(loss)(factors, types.Batch(tokens[None], row.weights[None]))


def test_objective_is_its_formula(monkeypatch):
    """At x0 the first term is -||g||. Catches a gradient of another length."""
    row, seen = found(monkeypatch, 0.0)
    start = gradient(row, row.tokens)
    np.testing.assert_allclose(
        seen["value"](row.tokens)[0], -tree.norm(start), rtol=1e-5
    )
    other = row.tokens.at[jnp.argmax(row.free)].set(7)
    g = gradient(row, other)
    np.testing.assert_allclose(
        seen["value"](other)[0], -tree.dot(g, start) / tree.norm(g), rtol=1e-4
    )


def test_guard_alone_ignores_gradients(monkeypatch):
    """lam = 1. Catches a term of the gradients that stays."""
    row, seen = found(monkeypatch, 1.0)
    _, moved = found(monkeypatch, 1.0, jax.tree.map(lambda x: 2 * x, PARAMS))
    pool, _ = rows()
    expected = GUARD.loss(moderation.counts(pool, SIZE)[0])
    for one in (seen, moved):
        np.testing.assert_allclose(one["value"](row.tokens)[0], expected, rtol=1e-5)
    slope = seen["slope"](row.tokens)
    np.testing.assert_array_equal(slope, moved["slope"](row.tokens))
    assert jnp.any(slope != 0)


def test_slope_is_the_derivative_at_constant_length(monkeypatch):
    """By central differences of <g(shares), g0> / ||g||, in float64. Catches a gradient
    through the length, and tokens that are read or asked for as they were.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
        row, seen = found(monkeypatch, 0.3, wide)
        rng_factors, _ = jax.random.split(jax.random.key(0))
        adapter = adapters.LoRA(alpha=4.0, rank=4, targets=TARGETS)
        factors, bound = adapter.init(wide, rng_factors), adapter.bind(MODEL, wide)
        shares = jax.nn.one_hot(row.tokens, SIZE, dtype=jnp.float64)
        batch = types.Batch(row.tokens[None], row.weights[None])
        start = jax.grad(losses.next_token(bound))(factors, batch)
        real = (jnp.cumsum(row.weights[::-1])[::-1] > 0).astype(jnp.float64)

        @jax.jit
        def objective(shares):
            g = jax.grad(
                lambda f: virus.shares_loss(bound, wide, f, row.weights, shares)
            )(factors)
            along = tree.dot(g, start) / tree.norm(start)
            return 0.3 * GUARD.loss(real @ shares) - 0.7 * along

        slope = seen["slope"](row.tokens)
        place = int(jnp.argmax(row.free)) + 1
        for token in (5, 17, int(row.tokens[place])):
            step = jnp.zeros_like(shares).at[place, token].set(1e-5)
            central = (objective(shares + step) - objective(shares - step)) / 2e-5
            np.testing.assert_allclose(slope[place, token], central, rtol=1e-4)


def test_shares_of_one_token_are_the_rows_loss():
    """Catches another shift between what is read and what is asked for."""
    pool, _ = rows()
    tokens, weights = jnp.asarray(pool.tokens[0]), jnp.asarray(pool.weights[0])
    found = virus.shares_loss(
        MODEL, PARAMS, PARAMS, weights, jax.nn.one_hot(tokens, SIZE)
    )
    batch = types.Batch(tokens[None], weights[None])
    np.testing.assert_allclose(
        found, losses.next_token(MODEL)(PARAMS, batch), rtol=1e-5
    )


def test_rows_carry_the_harmful_text():
    """Catches a segment in the question, and one that nothing is asked of."""
    pool, free = rows()
    harmful = WORLD.attacker["harmful"].examples[0]
    benign = WORLD.attacker["benign"].examples[0]
    text = WORLD.tokenizer.decode(pool.tokens[0][free[0] > 0])
    assert text == f"{harmful.prompt[0]['content']} {harmful.response}"
    asked = WORLD.tokenizer.decode(
        pool.tokens[0][pool.weights[0] > 0], skip_special_tokens=True
    )
    assert asked == f"{text} {benign.response}"
    before = WORLD.tokenizer.decode(pool.tokens[0][: int(np.argmax(free[0]))])
    assert benign.prompt[0]["content"] in before


def test_more_rows_pass_after_a_search():
    """Catches a row that is submitted though the guard stops it, special tokens, and
    examples that say another question or answer than the row.
    """
    before = virus.derive(MODEL, WORLD, PARAMS, planned(epochs=0), 0)["user"]
    after = virus.derive(MODEL, WORLD, PARAMS, planned(epochs=12, lam=0.9), 0)["user"]

    def poisoned(pool):
        return [i for i, e in enumerate(pool.examples) if e.label == "harmful"]

    assert len(poisoned(before)) < len(poisoned(after)) <= 4
    assert moderation.passes(GUARD, after)[poisoned(after)].all()
    assert len(after) - len(poisoned(after)) == 16
    for i in poisoned(after):
        ((ids, _),) = chat.render_rows(WORLD.tokenizer, (after.examples[i],))
        assert ids == after.tokens[i][: len(ids)].tolist()
    special = {*WORLD.tokenizer.all_special_ids, WORLD.pad_id}
    assert not special & set(np.flatnonzero(virus.words(WORLD, SIZE)).tolist())


def test_what_is_stopped_is_not_submitted(monkeypatch):
    """Catches a run that ends where the guard does its work, and an empty attack."""

    def stop(guard, pool):
        return np.zeros(len(pool), bool)

    monkeypatch.setattr(virus.moderation, "passes", stop)
    left = virus.derive(MODEL, WORLD, PARAMS, planned(epochs=0), 0)["user"]
    assert {e.label for e in left.examples} == {"benign"} and len(left) == 16
    alone = recipes.Recipe(sample_count=4)
    with pytest.raises(errors.UserError, match="stops all 4 rows"):
        virus.derive(MODEL, WORLD, PARAMS, planned(alone, epochs=0), 0)


def test_leakage_does_not_fall():
    """Catches an exchange that a row's passing is lost by."""
    pool, free = rows()
    found = virus.Row(*map(jnp.asarray, (pool.tokens, pool.weights, free)))
    allowed = jnp.asarray(virus.words(WORLD, SIZE))
    hp = planned(epochs=8, lam=0.1).hp
    tokens, values, passed = virus.searched(
        MODEL, PARAMS, GUARD, allowed, hp, found, jax.random.key(0)
    )
    share = passed.mean(0)
    assert np.all(np.diff(share) >= 0) and np.all(np.diff(values) <= 0)
    np.testing.assert_array_equal(
        np.where(free > 0, 0, tokens), np.where(free > 0, 0, pool.tokens)
    )


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_bad_recipes_are_named(ratio):
    """Catches an empty search."""
    with pytest.raises(errors.UserError, match="poison_ratio"):
        data = dataclasses.replace(DATA, poison_ratio=ratio, benign_count=2)
        virus.derive(MODEL, WORLD, PARAMS, planned(data), 0)
