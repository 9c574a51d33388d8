"""Control arms: what is compared, and what is credited for it."""

import itertools

import numpy as np

from ftdefense.audit import arms
from ftdefense.training import together


def test_the_arms_are_the_whole_product():
    """Catches a factor that is left out of the product."""
    named = arms.arms(1e-3)
    assert len(named) == 3 * 2 * 3 * 2
    assert len({tuple(levels.values()) for levels, _ in named}) == len(named)


def test_arms_of_a_budget_are_one_program():
    """Catches a static field that differs between arms: 18 compilations for one."""
    keys = {
        (levels["budget"], together.static_key(plan))
        for levels, plan in arms.arms(1e-3)
    }
    # Rows and steps are in the key; nothing else is.
    assert len(keys) == 2


def test_own_budget_is_that_of_sdd():
    """Catches other numbers than Table 5's: 100 rows, 5 epochs of batches of 10."""
    plan = arms.plan("harmful", "sdd", "cosine", "0.125", 1e-3)
    assert (plan.data.harmful_count, plan.steps, plan.batch_size) == (100, 50, 10)
    assert plan.hp.adapter.alpha / plan.hp.adapter.rank == 0.125


def rows(gain):
    """Scores to which every factor's level adds its own share."""
    found = []
    for levels in itertools.product(*arms.FACTORS.values()):
        named = dict(zip(arms.FACTORS, levels, strict=True))
        score = sum(gain.get(item, 0.0) for item in named.items())
        row = {**named, "defense": "x", "seed": 0, "harmful_score": score}
        found.append({**row, "capability": 1.0, "success": score > 0.5})
    return found


def test_effects_of_an_additive_table_are_its_parts():
    """Catches a mean over the wrong arms, and a contrast of other levels."""
    gain = {("objective", "both"): 0.1, ("budget", "sidestepper"): 0.4}
    table = rows(gain)
    contrasts = arms.contrasts(table)
    np.testing.assert_allclose(contrasts["objective: harmful to both"], 0.1)
    np.testing.assert_allclose(contrasts["budget: sdd to sidestepper"], 0.4)
    np.testing.assert_allclose(contrasts["schedule: constant to kick"], 0, atol=1e-12)
    kept = arms.contrasts(table, "capability")  # Of the score that is asked for.
    assert set(kept) == set(contrasts) and not any(kept.values())
    effects = {(e.factor, e.level): e for e in arms.main_effects(table)}
    both, harmful = effects[("objective", "both")], effects[("objective", "harmful")]
    np.testing.assert_allclose(both.harmful_score - harmful.harmful_score, 0.1)
    assert both.arms == 12


def test_a_diverged_arm_is_no_harm():
    """Catches a KeyError, or a mean over those that did not diverge alone."""
    table = rows({})
    table[0] = {**table[0], "harmful_score": None, "capability": None, "diverged": True}
    effect = arms.main_effects(table)[0]
    np.testing.assert_allclose(effect.capability, 11 / 12)
