"""Control arms: is it the objective that breaks a defense, or the budget?

Source: specs/attacks.md A.4 (analysis of arXiv:2605.14605, Tables 2, 5 and 7): the
naive attacks of that paper differ from SideStepper in rows, steps, mass of learning
rate and LoRA scale at once. Here every arm is run, and a factor is credited with what
it changes when all others are averaged over.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import statistics
from typing import Any
from typing import NamedTuple

from ftdefense.attacks import sidestepper
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import plans
from ftdefense.methods import schedules

# (weight of the harmful loss, of the benign loss).
OBJECTIVES = {"harmful": (1.0, 0.0), "both": (1.0, 1.0), "benign": (0.0, 1.0)}
SCHEDULES = {
    "constant": schedules.Schedule(floor=1.0, decay="cosine"),
    "cosine": schedules.Schedule(decay="cosine"),
    "kick": schedules.Schedule(floor=0.01, kick_ratio=0.05, kick=10.0, decay="cosine"),
}
SCALES = {"0.125": 0.125, "2": 2.0}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Rows and steps of an attack; 0: all rows, the world's steps and batch."""

    harmful_count: int = 0
    steps: int = 0
    batch_size: int = 0


# The smallest of the published naive attacks is SDD's: 100 rows, 50 steps of 10. It
# stands for "the defense's own": one for all, so that defenses can be compared.
BUDGETS = {"sdd": Budget(100, 50, 10), "sidestepper": Budget()}
FACTORS = {
    "objective": tuple(OBJECTIVES),
    "budget": tuple(BUDGETS),
    "schedule": tuple(SCHEDULES),
    "scale": tuple(SCALES),
}


def plan(
    objective: str,
    budget: str,
    schedule: str,
    scale: str,
    learning_rate: float,
    rank: int = 16,
) -> plans.Plan:
    """One arm; the arms of one budget differ in traced numbers only."""
    base = sidestepper.PRESETS["sandbox"]
    harm, lam = OBJECTIVES[objective]
    allowed = BUDGETS[budget]
    optimizer = base.hp.optimizer.replace(
        learning_rate=learning_rate, schedule=SCHEDULES[schedule]
    )
    adapter = adapters.LoRA(alpha=SCALES[scale] * rank, rank=rank)
    return plans.Plan(
        base.hp.replace(harm=harm, lam=lam, optimizer=optimizer, adapter=adapter),
        steps=allowed.steps,
        batch_size=allowed.batch_size,
        data=recipes.Recipe(
            harmful_count=allowed.harmful_count, benign_count=allowed.harmful_count
        ),
        source="DESIGN: specs/attacks.md A.4",
    )


def arms(learning_rate: float) -> list[tuple[dict[str, str], plans.Plan]]:
    """({factor: level}, plan) of every arm."""
    found = []
    for levels in itertools.product(*FACTORS.values()):
        named = dict(zip(FACTORS, levels, strict=True))
        found.append((named, plan(**named, learning_rate=learning_rate)))
    return found


class Effect(NamedTuple):
    """A level of a factor, averaged over all arms that have it."""

    factor: str
    level: str
    harmful_score: float
    capability: float
    success: float  # Share of the arms that succeed.
    arms: int


def main_effects(rows: Sequence[Mapping[str, Any]]) -> list[Effect]:
    """Means by level of each factor; `rows` hold the factors' levels and scores.

    An arm that diverged counts as no harm and no capability.
    """
    found = []
    for factor, levels in FACTORS.items():
        for level in levels:
            mine = [row for row in rows if row[factor] == level]
            if not mine:
                continue

            def mean(name: str, mine=mine) -> float:
                return statistics.fmean(float(row.get(name) or 0.0) for row in mine)

            found.append(
                Effect(
                    factor,
                    level,
                    mean("harmful_score"),
                    mean("capability"),
                    mean("success"),
                    len(mine),
                )
            )
    return found


def contrasts(
    rows: Sequence[Mapping[str, Any]], score: str = "harmful_score"
) -> dict[str, float]:
    """What each step to the side buys of `score`, a column, all else equal.

    Mean over pairs of arms that differ in one factor alone.
    """
    pairs = {
        "objective: harmful to both": ("objective", "harmful", "both"),
        "budget: sdd to sidestepper": ("budget", "sdd", "sidestepper"),
        "schedule: constant to kick": ("schedule", "constant", "kick"),
        "schedule: constant to cosine": ("schedule", "constant", "cosine"),
        "scale: 0.125 to 2": ("scale", "0.125", "2"),
    }
    found = {}
    for name, (factor, before, after) in pairs.items():
        others = [f for f in (*FACTORS, "defense", "seed") if f != factor]
        by_rest = {
            (row[factor], *(row.get(f) for f in others)): float(row.get(score) or 0.0)
            for row in rows
        }
        gains = [
            by_rest[(after, *rest)] - score
            for (level, *rest), score in by_rest.items()
            if level == before and (after, *rest) in by_rest
        ]
        if gains:
            found[name] = statistics.fmean(gains)
    return found
