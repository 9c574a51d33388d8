"""A plan: a method's hyperparameters with its budget and its data recipe."""

import dataclasses
import math
from typing import Any

from ftdefense.data import recipes


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a method; a module offers several by name in `PRESETS`.

    Only `hp` enters `step`. What is here besides it changes what is drawn from the
    data and how often, not the compiled program.

    Attributes:
      hp: the method's `Hparams`.
      batch_size: rows of each role that one step consumes; 0: the world's default.
      steps: optimizer steps; 0: from `epochs`.
      epochs: passes over the first role's rows; 0: the world's default steps.
      data: which rows of the attacker's pools are used (defenses use all of theirs).
      source: where the numbers are from.
    """

    hp: Any
    batch_size: int = 0
    steps: int = 0
    epochs: float = 0.0
    data: recipes.Recipe = recipes.Recipe()
    source: str = ""

    def total_steps(self, rows: int, batch_size: int, default: int) -> int:
        """Optimizer steps on `rows` rows; every epoch's last batch may be incomplete.

        As transformers' Trainer counts them.
        """
        if self.steps:
            return self.steps
        if self.epochs:
            return math.ceil(self.epochs * math.ceil(rows / batch_size))
        return default


def sandbox(hp: Any, *, steps: int = 0, batch_size: int = 0) -> Plan:
    """A preset of ours for the sandbox: chosen by `experiments/tune.py`."""
    source = "DESIGN: BUILD_NOTES.md, Sandbox presets"
    return Plan(hp, batch_size=batch_size, steps=steps, source=source)
