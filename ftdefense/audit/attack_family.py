"""A family: an attack with what is tried of it first, and what a sweep searches after."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from ftdefense.audit import spaces
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.methods import plans

LR = "optimizer.learning_rate"
RATES = spaces.Range(1e-5, 1e-2)
STEPS, BATCH = 192, 32  # Of the sandbox, whose numbers families hold; see `at_scale`.


@dataclasses.dataclass(frozen=True)
class Family:
    """Attacks that differ in numbers and shapes only.

    Attributes:
      attack: module of `ftdefense.attacks`.
      preset: its plan.
      space: what a sweep may vary.
      points: what it tries first.
      trials: how many at each of `families.BUDGETS`; 0: left out.
      fixed: overrides of the plan that hold for every trial.
      template: if the defense has one of these templates, its points run at any budget:
        all of them, or the first `at_template`.
      trains: whether the attack trains; `ALIGNED` must fall to every one that does.
      knows: what the attacker holds besides the release.
      mass_of: the family whose trials it repeats, each at a constant learning rate of
        equal mass: the control without which a schedule must not be credited.
      plan: in place of a preset.
      published: its numbers are somebody's, and are not put to scale.
    """

    attack: str
    space: spaces.Space
    points: Sequence[Mapping[str, Any]]
    trials: tuple[int, int, int]
    preset: str = "sandbox"
    fixed: tuple[str, ...] = ()
    template: tuple[str, ...] = ()
    at_template: int = 0
    trains: bool = True
    knows: str = "nothing"
    mass_of: str = ""
    plan: plans.Plan | None = None
    published: bool = False


def grid(axis: str, *values: Any) -> dict[str, Any]:
    """Space and points of an attack that is tried at a few values only."""
    return {
        "space": {axis: spaces.Choice(values)},
        "points": [{axis: value} for value in values],
        "trials": (len(values),) * 3,
    }


def rates(*values: float, **fields: Any) -> list[dict[str, Any]]:
    """A point for each learning rate; `fields` are common to all."""
    return [{LR: value, **fields} for value in values]


def swept(attack: str, *values: float, trials=(4, 12, 40), **options: Any) -> Family:
    """A training attack swept over the learning rate, all parameters training."""
    return Family(attack, {LR: RATES}, rates(*values), trials, **options)


def at_scale(family: Family, times: float, rows: float, rate: float) -> Family:
    """The same, with so many times the steps, rows of a batch and learning rate."""
    if family.published:
        return family
    factors = {"steps": times, "batch_size": rows}

    def whole(axis: str, value: int) -> int:
        return max(1, round(value * factors[axis]))

    def point(values: Mapping[str, Any]) -> dict[str, Any]:
        found = {a: whole(a, v) if a in factors else v for a, v in values.items()}
        return found | ({LR: found[LR] * rate} if LR in found else {})

    def kind(axis: str, kind: spaces.Range | spaces.Choice):
        if axis in factors:
            values = dict.fromkeys(whole(axis, value) for value in kind.values)
            return dataclasses.replace(kind, values=tuple(values))
        if axis == LR:
            return dataclasses.replace(kind, low=kind.low * rate, high=kind.high * rate)
        return kind

    def fixed(assignment: str) -> str:
        axis, _, value = assignment.partition("=")
        return f"{axis}={whole(axis, int(value))}" if axis in factors else assignment

    return dataclasses.replace(
        family,
        space={axis: kind(axis, of) for axis, of in family.space.items()},
        points=[point(values) for values in family.points],
        fixed=tuple(map(fixed, family.fixed)),
    )


def within(family: Family, rows: Mapping[str, int]) -> Family:
    """The same, where no more rows of a role are asked for than there are."""
    most = {f"data.{role}_count": count for role, count in rows.items()}

    def cut(axis: str, value: Any) -> Any:
        return min(value, most[axis]) if axis in most else value

    def fixed(assignment: str) -> str:
        axis, _, value = assignment.partition("=")
        return f"{axis}={cut(axis, int(value))}" if axis in most else assignment

    points = [{a: cut(a, v) for a, v in values.items()} for values in family.points]
    space = {
        axis: dataclasses.replace(
            kind, values=tuple(dict.fromkeys(cut(axis, v) for v in kind.values))
        )
        if axis in most
        else kind
        for axis, kind in family.space.items()
    }
    return dataclasses.replace(
        family,
        space=space,
        points=[p for i, p in enumerate(points) if p not in points[:i]],
        fixed=tuple(map(fixed, family.fixed)),
    )


def of_attack(reference: str) -> tuple[str, Family]:
    """Name and family of one attack, `name[:preset]` or a file: its rate is swept.

    Raises:
      UserError: if there is no such attack or preset.
    """
    module_name, _, preset = reference.partition(":")
    module, preset = registry.load("attacks", module_name), preset or "sandbox"
    if preset not in module.PRESETS:
        raise errors.unknown(f"preset of {module_name}", preset, module.PRESETS)
    plan = module.PRESETS[preset]
    name = f"attack {pathlib.Path(reference).name}"
    if not hasattr(plan.hp, "optimizer"):
        return name, Family(module_name, {}, [{}], (1, 1, 1), preset)
    rate = float(plan.hp.optimizer.learning_rate)
    space = {LR: spaces.Range(rate / 30, rate * 30)}
    points = [{LR: rate * factor} for factor in (1.0, 0.3, 3.0, 10.0)]
    return name, Family(module_name, space, points, (4, 12, 40), preset)
