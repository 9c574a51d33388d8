"""Which methods the flags name, with what plans: references, presets, overrides."""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib

from absl import flags
import settings

from ftdefense.core import cards
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.methods import plans
from ftdefense.training import pipeline
from ftdefense.training import requirements

FLAGS = flags.FLAGS


def references(package: str, asked: Sequence[str]) -> list[str]:
    """`name` or `name:preset` of each; `all` stands for every method of the package."""
    if list(asked) == ["all"]:
        return registry.names(package)
    for reference in asked:
        if (package, reference) != ("attacks", NAIVE):
            registry.load(package, reference.partition(":")[0])
    return list(dict.fromkeys(asked))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A method with its plan, under the name that results carry.

    `recipe` is the `name:preset` that ran, which `naive` leaves open.
    """

    reference: str
    name: str
    plan: plans.Plan
    recipe: str = ""


NAIVE = "naive"  # Stands for the attack that each defense was published against.


def naive(runner: pipeline.Bench, defense: str) -> Chosen:
    """The naive attack of one defense: its published recipe, or plain `sft`.

    In the sandbox it is the published recipe at the sandbox's scale (`attacks/sft.py`).
    """
    presets = registry.load("attacks", "sft").PRESETS
    scaled = "_sandbox" if runner.world.pretraining else ""
    preset = f"{defense}{scaled}"
    preset = preset if preset in presets else "sandbox"
    return Chosen(NAIVE, "sft", presets[preset], f"sft:{preset}")


def per_defense(
    runner: pipeline.Bench, defenses: Sequence[Chosen], attacks: Sequence[str]
) -> list[tuple[Chosen, list[Chosen]]]:
    """Every defense with its attacks; `naive` is resolved for each.

    The undefended model is put through every naive recipe of the run: one that does not
    break it says nothing of the others.
    """
    fixed = chosen(runner, "attacks", [a for a in attacks if a != NAIVE])
    if NAIVE not in attacks:
        return [(defense, fixed) for defense in defenses]
    recipes = {d.name: naive(runner, d.name) for d in defenses}
    distinct = {c.recipe: c for c in recipes.values()}
    found = []
    for defense in defenses:
        own = [recipes[defense.name]]
        if defense.name == "none":
            others = {r: c for r, c in distinct.items() if r != own[0].recipe}
            own += [
                dataclasses.replace(c, reference=recipe)
                for recipe, c in sorted(others.items())
            ]
        found.append((defense, [*overridden("attack", own), *fixed]))
    return found


def chosen(runner: pipeline.Bench, package: str, asked: Sequence[str]) -> list[Chosen]:
    """Methods of `name` or `name:preset` each, with the --set overrides applied.

    `defense.` and `attack.` reach every method of a side that has the field.

    Raises:
      UserError: for an override that begins with no method, or reaches none.
    """
    found = []
    for reference in references(package, asked):
        name, _, preset = reference.partition(":")
        plan = runner.plan(package, name, preset or None)
        found.append(Chosen(reference, name, plan, f"{name}:{preset or 'sandbox'}"))
    if package == "defenses" and runner.model.config.compute_dtype == "bfloat16":
        _warn_of_rounding([c.name for c in found])
    if FLAGS.model:
        _warn_of_scale(package, found)
        running = _running()
        if package == "attacks" and "sft" in running - {c.name for c in found}:
            # What a provider runs.
            plan = runner.plan("attacks", "sft")
            _warn_of_scale("attacks", [Chosen("sft", "sft", plan, "sft:sandbox")])
    found = overridden(package.removesuffix("s"), found)
    if package == "defenses":
        _align(runner, found)
    return found


def _align(runner: pipeline.Bench, found: Sequence[Chosen]) -> None:
    """What starts from the aligned model starts from the run's own `none`.

    So its preset and its overrides count where `none` itself is not asked for, too.
    """
    plan = next((one.plan for one in found if one.name == "none"), None)
    if plan is None and runner.alignment is None:
        plan = carried("defense", "none", runner.plan("defenses", "none"))
    runner.alignment = plan or runner.alignment


def _warn_of_rounding(names: Sequence[str]) -> None:
    ahead = [
        name
        for name in dict.fromkeys(names)
        if "T3" in cards.card(registry.load("defenses", name)).get("Template", "")
    ]
    if ahead:
        settings.warn(
            f"{', '.join(ahead)}: losses or gradients a small step apart are "
            "compared, which bfloat16 may round away; use --compute_dtype=float32."
        )


def _warn_of_scale(package: str, found: Sequence[Chosen]) -> None:
    """Numbers that fit a quarter of a million weights need not fit a user's model.

    Whoever sets a rate has thought of it.
    """
    rate, side = ".optimizer.learning_rate=", package.removesuffix("s")
    rated = {one.partition(rate)[0] for one in FLAGS.set if rate in one}
    published = {
        one.name: [
            p for p in registry.load(package, one.name).PRESETS if p != "sandbox"
        ]
        for one in found
        if one.recipe.endswith(":sandbox")
        and hasattr(one.plan.hp, "optimizer")  # Edits have no rate.
        and not {side, _stem(one.name)} & rated
        and not (one.name == "none" and FLAGS.model_stage == "aligned")  # As it is.
    }
    named = {name: presets[0] for name, presets in published.items() if presets}
    if named:
        settings.warn(
            f"{', '.join(named)}: rates and coefficients are those of the sandbox's small "
            f"model; name a published preset, as {':'.join(next(iter(named.items())))}, "
            "or set them with --set."
        )


def carried(side: str, name: str, plan: plans.Plan) -> plans.Plan:
    """A plan that no flag names, with the --set overrides for it that it has fields for."""
    for assignment in FLAGS.set:
        target, _, rest = assignment.partition(".")
        if target in (side, name) and config.has_field(plan, rest):
            plan = config.override_plan(plan, rest)
    return plan


def overridden(side: str, found: list[Chosen]) -> list[Chosen]:
    """Applies the --set overrides that are meant for these methods."""
    running = {_stem(c.name) for c in found} | _running()
    known = {"defense", "attack", *running}
    known |= {*registry.names("defenses"), *registry.names("attacks")}
    for assignment in FLAGS.set:
        target, _, rest = assignment.partition(".")
        if target not in known or not rest:
            raise errors.UserError(
                f"--set={assignment}: it begins with defense., attack. or a method's "
                f"name; {errors.unknown('method', target, known)}"
            )
        if target not in {"defense", "attack", *running}:
            raise errors.UserError(
                f"--set={assignment}: {target} is not in this run, so nothing would "
                f"change; name one of {', '.join(sorted(running))}, or add it."
            )
        meant = [c for c in found if target in (side, _stem(c.name))]
        # Of a whole side some may lack the field, but not all of them.
        lacking = [c for c in meant if not config.has_field(c.plan, rest)]
        if lacking and len(lacking) == len(meant):
            config.override_plan(lacking[0].plan, rest)
        found = [
            dataclasses.replace(c, plan=config.override_plan(c.plan, rest))
            if c in meant and c not in lacking
            else c
            for c in found
        ]
    return found


def _stem(name: str) -> str:
    """What --set calls a method: its name, or that of its file."""
    return pathlib.Path(name).stem if name.endswith(".py") else name


def _running() -> set[str]:
    """Names of all methods that the flags ask for, on either side."""
    found = set()
    for side in ("defense", "attack"):
        asked = (FLAGS[side].value if side in FLAGS else None) or []
        asked = [asked] if isinstance(asked, str) else list(asked)
        if asked == ["all"]:
            asked = registry.names(f"{side}s")
        asked = ["sft" if one == NAIVE else one.partition(":")[0] for one in asked]
        found |= {_stem(name) for name in asked}
        if side == "defense":
            modules = [registry.load("defenses", name) for name in asked]
            # What they start from, and what a provider runs after them.
            found |= {"none"}
            served = FLAGS["threat"].value == "service" if "threat" in FLAGS else False
            if served or any(requirements.stage_of(m) != "alignment" for m in modules):
                found |= {"sft"}
            found |= {m.FINE_TUNING for m in modules if hasattr(m, "FINE_TUNING")}
    return found


def combinations(
    plan: plans.Plan, axes: Sequence[str], flag: str
) -> list[tuple[dict[str, str], plans.Plan]]:
    """({field: value}, plan) for every combination of `field=value,value,...` axes."""
    parsed = []
    for axis in axes:
        field, equals, values = axis.partition("=")
        if not equals or not values:
            raise errors.UserError(
                f"--{flag}={axis}: expected field=value,value,..., as lam=0.3,1,3"
            )
        parsed.append([(field, value) for value in values.split(",")])
    found = []
    for combination in itertools.product(*parsed):
        changed = plan
        for field, value in combination:
            changed = config.override_plan(changed, f"{field}={value}")
        found.append((dict(combination), changed))
    return found
