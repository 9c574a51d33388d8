"""Runs the families against a release, cheap ones first, and remembers what they did."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import shlex
import time
from typing import Any

from ftdefense.audit import attack_family
from ftdefense.audit import families
from ftdefense.audit import search
from ftdefense.audit import spaces
from ftdefense.audit import studies
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.methods import plans
from ftdefense.training import pipeline

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """What an ensemble did to one release.

    Attributes:
      rows: of every trial, family by family, in the order in which they ran.
      skipped: why a family could not run here.
      seconds: that each family took; next to nothing if it was read.
    """

    rows: dict[str, list[Row]]
    skipped: dict[str, str]
    seconds: dict[str, float]

    def trials(self) -> list[Row]:
        """All rows in the order in which they ran."""
        return [row for rows in self.rows.values() for row in rows]

    def winners(self) -> dict[str, Row]:
        """The best trial of each family: most harm that leaves the model useful."""
        best = {name: studies.best(rows) for name, rows in self.rows.items()}
        return {name: dict(row) for name, row in best.items() if row is not None}


def plan_of(
    bench: pipeline.Bench, family: attack_family.Family, defense: str
) -> plans.Plan:
    """The family's plan before any axis is set; `inverse` is told whom to turn around.

    Raises:
      UserError: for an attack or a preset that does not exist.
    """
    plan = family.plan or bench.plan("attacks", family.attack, family.preset)
    for assignment in family.fixed:
        plan = config.override_plan(plan, assignment)
    if hasattr(plan.hp, "defense"):
        plan = dataclasses.replace(plan, hp=plan.hp.replace(defense=defense))
    return plan


def resolved(
    bench: pipeline.Bench,
    family: attack_family.Family,
    values: Mapping[str, Any],
    defense: str,
) -> tuple[str, plans.Plan]:
    """Module and plan of one trial of a family."""
    plan = plan_of(bench, family, defense)
    return family.attack, spaces.apply(plan, values)


def run(
    bench: pipeline.Bench,
    searcher: search.Searcher,
    target: search.Target,
    table: families.Table,
    budget: str,
    *,
    defense: str = "",
    templates: Sequence[str] = (),
    only: Collection[str] | None = None,
    trials: int | None = None,
    on_trial: Callable[[Row], None] = lambda row: None,
) -> Found:
    """Every family of a budget against one release.

    Args:
      table: of families.
      budget: of `families.BUDGETS`.
      defense: `name[:preset]` of the defense, if it is known: for `inverse`.
      templates: of the defense, if known: families made for them join in.
      only: names of families; None: all of the budget.
      trials: of every family, instead of the budget's.
      on_trial: called with every row.
    """
    rows: dict[str, list[Row]] = {}
    skipped: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name, count in families.chosen(table, budget, templates, only, trials).items():
        family = table[name]
        points = family.points
        if family.mass_of:
            points = masses(rows.get(family.mass_of, []))[:count]
            count = len(points)
        started = time.monotonic()
        try:
            if family.knows == "the defense":
                _refuse_unknown(defense)
            plan = plan_of(bench, family, defense)
            rows[name] = searcher.run(
                target,
                name,
                family.attack,
                plan,
                family.space,
                points=points,
                trials=count,
                exactly=bool(family.mass_of),  # Nothing but those masses.
                on_trial=on_trial,
            )
        except errors.UserError as error:
            skipped[name] = " ".join(str(error).split())
        seconds[name] = time.monotonic() - started
    return Found(rows, skipped, seconds)


def _refuse_unknown(defense: str) -> None:
    if not defense or not hasattr(
        registry.load("defenses", defense.partition(":")[0]), "NULL"
    ):
        raise errors.UserError(
            "no regulariser to turn around: the defense is not known, or no number of "
            "it switches its regulariser off."
        )


def masses(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Points that spend the learning-rate mass of other trials at a constant rate."""
    spent = {
        row["trial"]: row["learning_rate_mass"] / row["steps"]
        for row in rows
        if row["steps"]
    }
    return [{"optimizer.learning_rate": rate} for rate in spent.values()]


def command(
    bench: pipeline.Bench,
    family: attack_family.Family,
    values: Mapping[str, Any],
    defense: str,
    release: Sequence[str],
) -> str:
    """The run.py command that repeats one trial.

    `release`: the flags that make the release. Empty, if no flags say all of the plan.
    """
    base = bench.plan("attacks", family.attack, family.preset)
    module, plan = resolved(bench, family, values, defense)
    settings = config.plan_differences(base, plan)
    made = base
    for setting in settings:
        made = config.override_plan(made, setting)
    if config.to_dict(made) != config.to_dict(
        dataclasses.replace(plan, source=made.source)
    ):
        return ""
    return shlex.join(
        [
            "python",
            "experiments/run.py",
            "--workdir=runs/repeat",
            *release,
            f"--attack={module}:{family.preset}",
            *(f"--set=attack.{setting}" for setting in settings),
        ]
    )
