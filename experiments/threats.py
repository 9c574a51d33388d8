"""Which threat model a defense is run in, and what an attack and a provider do there."""

import choices

from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.methods import plans
from ftdefense.training import pipeline
from ftdefense.training import requirements
from ftdefense.training import serving


def acts_in_service(defense: str) -> bool:
    """Whether a defense trains on, or edits after, the user's fine-tuning."""
    return requirements.stage_of(registry.load("defenses", defense)) != "alignment"


def fits(defense: str, threat: str) -> bool:
    """Whether a defense has anything to do under a threat model."""
    return not (threat == "open_weight" and acts_in_service(defense))


def check_release(bench: pipeline.Bench, defense: str, plan: plans.Plan) -> None:
    """Refuses, before anything trains, what makes no weights for an attacker to train.

    Raises:
      UserError: if the defense acts elsewhere, or this run lacks what it needs.
    """
    if acts_in_service(defense):
        raise errors.UserError(
            f"--defense={defense} acts while a provider fine-tunes, and this script is "
            "about released weights; use run.py or audit.py."
        )
    bench.check(defense, plan)


def threat(defense: str, asked: str) -> str:
    """The threat model of a defense's cells: what was asked for, or its own.

    Raises:
      UserError: if the attacker of open weights would never meet the defense.
    """
    if not fits(defense, asked):
        raise errors.UserError(
            f"--defense={defense} acts while a provider fine-tunes, which an attacker "
            "of open weights skips; use --threat=service, or leave --threat out."
        )
    return asked or ("service" if acts_in_service(defense) else "open_weight")


def of_rows(attack: str) -> bool:
    """Whether an attack is what the user of a service submits, and nothing else."""
    return bool(_submits(attack))


def _submits(attack: str) -> tuple[str, ...] | None:
    """Roles that an attack hands in; none, or None where only its recipe counts."""
    return getattr(registry.load("attacks", attack), "SUBMITS", None)


def check(attack: str) -> None:
    """Refuses an attack of which a user of a service has nothing to submit.

    Raises:
      UserError: if it is not made of rows and their answers.
    """
    if _submits(attack) == ():
        raise errors.UserError(
            f"--attack={attack} is not made of questions and answers, which are all that "
            "the user of a service submits; use --threat=open_weight."
        )


def provider(
    bench: pipeline.Bench, defense: str, plan: plans.Plan, recipe: str = ""
) -> tuple[serving.Provider, serving.Edits]:
    """The provider's fine-tuning method, and its edits of what comes out.

    Where the defense has no method of its own it is plain `sft`, which --set reaches.
    `recipe`, the defense's `name:preset`, picks the preset of its second stage, if that
    has it.
    """
    module = registry.load("defenses", defense)
    stage = requirements.stage_of(module)
    if stage == "fine_tuning":
        return ("defenses", defense, plan), ()
    if hasattr(module, "FINE_TUNING"):  # A defense of two stages.
        second = module.FINE_TUNING
        preset = recipe.partition(":")[2]
        known = registry.load("defenses", second).PRESETS
        plan = bench.plan("defenses", second, preset if preset in known else None)
        plan = choices.carried("defense", second, plan)
        return ("defenses", second, plan), ()
    edits = ((defense, plan),) if stage == "post_fine_tuning" else ()
    plan = choices.carried("attack", "sft", bench.plan("attacks", "sft"))
    return ("attacks", "sft", plan), edits
