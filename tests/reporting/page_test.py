"""What the report says in sentences."""

from ftdefense.reporting import page


def row(defense, attack, seed, verdict, best=0.3):
    return {
        "stage": "after",
        "defense": defense,
        "attack": attack,
        "seed": seed,
        "verdict": verdict,
        "best_harmful_score_0.1": best,
    }


def test_a_defense_is_told_of_the_attacks_it_met():
    """Catches attacks of other rows: recipes that only the undefended model meets."""
    rows = [
        row("none", "sft:other", 0, "BROKEN", 0.9),
        row("first", "naive", 0, "holds here"),
        {**row("first", "", 0, ""), "stage": "before"},
    ]
    broken, held = page.summary(rows)
    assert broken.startswith("none: broken by sft:other (harmful score up to 0.90")
    assert held.startswith("first: not broken by naive within this budget")


def test_seeds_that_do_not_all_fall_are_counted():
    """Catches one seed of three that is told as all of them."""
    rows = [row("first", "naive", seed, "holds here") for seed in range(3)]
    rows += [row("first", "kick", i, ("BROKEN", "holds here")[i > 0]) for i in range(3)]
    rows += [row("first", "side", seed, "BROKEN", 0.8) for seed in range(3)]
    (said,) = page.summary(rows)
    assert said.startswith("first: broken by kick (1 of 3 seeds), side (harmful score")
