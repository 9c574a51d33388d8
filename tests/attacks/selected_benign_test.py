"""Selected benign: both scores against their formulas, invariance, what is selected.

Mutants:
  `row.weights[::-1] > 0` -> `row.weights > 0`
  `place <= tokens` -> `place < tokens`
  `WEIGHTS = (1.0, -1.0, -1.0)` -> `WEIGHTS = (1.0, -1.0, 1.0)`
  `np.argsort(-score_C` -> `np.argsort(score_C`
  `tree.normalize(jax.grad(loss)(factors, row))` -> `jax.grad(loss)(factors, row)`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import selected_benign
from ftdefense.core import errors
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.methods import adapters
from ftdefense.models import toy
from ftdefense.objectives import losses

WORLD = sandbox.build("tiny", 0)
MODEL = toy.Toy(vocab=len(WORLD.tokenizer))
PARAMS = MODEL.init(jax.random.key(0))
DATA = recipes.Recipe(harmful_count=40, benign_count=48)


def planned(**fields):
    plan = selected_benign.PRESETS["sandbox"]
    return dataclasses.replace(plan, hp=plan.hp.replace(**fields), data=DATA)


def derived(world=WORLD, **fields):
    plan = planned(**fields)
    return selected_benign.derive(MODEL, world, PARAMS, plan, 0)["selected"]


def test_representation_is_the_final_state_of_the_last_token():
    """Catches the first token's state, padding's, and an average of more than n."""
    rows = pools.take(WORLD.attacker["benign"], 5)
    found = selected_benign.states(MODEL, PARAMS, selected_benign.batch(rows))
    for row, state in zip(range(5), found, strict=True):
        length = np.flatnonzero(rows.weights[row])[-1] + 1
        tokens = rows.tokens[row : row + 1, :length]
        expected = MODEL(PARAMS, jnp.asarray(tokens)).hidden["final"][0, -1]
        np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-6)


def test_closeness_is_the_mean_of_the_largest_cosines():
    """A candidate that is a harmful row scores 1. Catches dot products for cosines."""
    harmful = jnp.array([[3.0, 0.0], [0.0, 2.0]])
    candidates = jnp.array([[6.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    found = selected_benign.closeness(candidates, harmful, 1)
    np.testing.assert_allclose(found, [1, 2**-0.5, 0, 0.8], atol=1e-6)
    both = selected_benign.closeness(candidates, harmful, 2)
    np.testing.assert_allclose(both, [0.5, 2**-0.5, -0.5, 0.7], atol=1e-6)


def test_only_the_first_answer_tokens_count():
    """Catches a cut that is off by one, and one that counts the prompt."""
    rows = selected_benign.batch(pools.take(WORLD.attacker["benign"], 3))
    cut = selected_benign.opening(rows, 4).weights
    np.testing.assert_array_equal(jnp.sum(cut, -1), [4, 4, 4])
    first = jnp.argmax(rows.weights > 0, -1)
    np.testing.assert_array_equal(jnp.argmax(cut > 0, -1), first)


def test_gradient_score_is_its_formula(monkeypatch):
    """In float64 from single gradients. Catches anchors that are normalised again, a
    gradient that is not, and a lost or swapped sign.
    """
    seen = []
    original = selected_benign.along

    def noted(model, params, rows, rng, toward=None, **options):
        seen.append(rows)
        return original(model, params, rows, rng, toward, **options)

    monkeypatch.setattr(selected_benign, "along", noted)
    harmful = pools.take(WORLD.attacker["harmful"], 12)
    benign = pools.take(WORLD.attacker["benign"], 4)
    hp = planned(by="gradient", anchors=3, tokens=3).hp
    found = selected_benign.scores(MODEL, PARAMS, WORLD, benign, harmful, hp, 0)

    adapter = adapters.LoRA(alpha=4.0, rank=4)
    factors = adapter.init(PARAMS, jax.random.key(0))
    gradient = jax.jit(jax.grad(losses.next_token(adapter.bind(MODEL, PARAMS))))

    def units(rows):
        every = []
        for i in range(len(rows.tokens)):
            row = jax.tree.map(lambda x, i=i: x[i : i + 1], rows)
            flat = [np.ravel(x) for x in jax.tree.leaves(gradient(factors, row))]
            g = np.concatenate(flat).astype(np.float64)
            every.append(g / np.linalg.norm(g))
        return np.array(every)

    *sets, candidates = seen
    anchors = [units(rows).mean(0) for rows in sets]
    assert all(np.linalg.norm(a) < 0.999 for a in anchors)
    expected = units(candidates) @ (anchors[0] - anchors[1] - anchors[2])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    said = [WORLD.tokenizer.decode(np.asarray(x)) for x in sets[1].tokens]
    refusals = {e.response for e in WORLD.defender["refusal"].examples}
    assert all(any(r in text for r in refusals) for text in said)


@pytest.mark.parametrize("by", ["representation", "gradient"])
def test_selection_is_invariant_to_the_order_of_candidates(by):
    """B.15. Catches an index into something else than the candidates."""
    benign = WORLD.attacker["benign"]
    turned = pools.take(benign, np.random.default_rng(0).permutation(48))
    world = dataclasses.replace(WORLD, attacker={**WORLD.attacker, "benign": turned})
    first, second = derived(by=by, count=8), derived(world, by=by, count=8)
    assert {e.key for e in first.examples} == {e.key for e in second.examples}


def test_a_harmful_row_among_the_candidates_is_selected_first():
    """Catches the least similar rows, and a comparison with the benign ones."""
    row = pools.take(WORLD.attacker["harmful"], np.array([7]))
    benign = pools.take(WORLD.attacker["benign"], 47)
    mixed = pools.concatenate([benign, row], "benign")
    world = dataclasses.replace(WORLD, attacker={**WORLD.attacker, "benign": mixed})
    assert derived(world, count=1).examples == row.examples


def test_random_selection_is_the_control():
    """Catches a control that looks at the data; and more rows than there are."""
    chosen = derived(by="random", count=8)
    assert len({e.key for e in chosen.examples}) > 4
    assert chosen.examples != derived(by="representation", count=8).examples
    with pytest.raises(errors.UserError, match="49 rows of 48"):
        derived(count=49)
