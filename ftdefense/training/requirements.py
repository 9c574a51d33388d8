"""What a method needs of a run, asked before anything trains."""

from collections.abc import Collection
from collections.abc import Iterable
import re
import types as python_types

from ftdefense.core import cards
from ftdefense.core import errors

PROVIDERS = {
    "harmful": "--harmful",
    "alignment": "--benign and --refusals",
    "retain": "--benign and --refusals",
    "refusal": "--refusals",
    "benign": "--benign",
    "unrelated": "--benign",
    "user": "--harmful",
    "user_refusal": "--refusals",
    "adversary": "more prompts in --harmful",
    "heldout": "more prompts in --harmful",
    "heldout_refusal": "more prompts in --harmful and --refusals",
    "task": "--task",
}
STAGES = ("alignment", "fine_tuning", "post_fine_tuning")


def roles(name: str, wanted: Iterable[str], given: Collection[str]) -> None:
    """Refuses a method that asks for data which the run does not have."""
    missing = sorted(set(wanted) - set(given))
    if missing:
        flags = [PROVIDERS.get(role, f"a pool {role!r}") for role in missing]
        raise errors.UserError(
            f"{name} needs rows for {', '.join(missing)}, which this run does not "
            f"have; provide them with {', '.join(dict.fromkeys(flags))}."
        )


def weights(name: str, module: python_types.ModuleType, pretrained: bool) -> None:
    """Refuses a method whose `NEEDS` names weights which the run does not have."""
    if "pretrained" in getattr(module, "NEEDS", ()) and not pretrained:
        raise errors.UserError(
            f"{name} needs the weights before alignment; give them with "
            "--pretrained=FOLDER."
        )


def stage_of(module: python_types.ModuleType) -> str:
    """Where a defense acts: one of `STAGES`, the first word of its header's Stage."""
    found = re.match(r"\w+", cards.card(module).get("Stage", ""))
    stage = found.group() if found else STAGES[0]
    if stage not in STAGES:
        raise errors.UserError(
            f"{module.__name__}: its docstring's Stage is {stage!r}; begin it with one "
            f"of {', '.join(STAGES)}."
        )
    return stage
