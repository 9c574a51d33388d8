"""A stage to be run, resolved: data, keys, steps and the facts of its budget."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any
import zlib

import jax
import numpy as np

from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import streams as data_streams
from ftdefense.methods import plans
from ftdefense.training import budgets
from ftdefense.training import requirements


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A stage to be run, resolved: nothing that it depends on is left open.

    Attributes:
      name: of the stage, as `defended-booster`.
      method, plan: what trains, and how.
      lineage: where it starts.
      roles: the data that it may draw from; an attack sees the attacker's alone.
      seed: of data order, initial adapters and noise.
      budget: steps and batch size where the plan has none.
      parents: digests of what came before and is in no other field.
    """

    name: str
    method: types.Method
    plan: plans.Plan
    lineage: types.Lineage
    roles: Mapping[str, pools.Pool]
    seed: int
    budget: budgets.Budget
    parents: tuple[Any, ...]

    def __post_init__(self):
        requirements.roles(self.name, self.leading, self.roles)

    @functools.cached_property
    def leading(self) -> dict[str, tuple[int, ...]]:
        """Leading shape of the batches of each role that one step consumes."""
        return dict(self.method.streams(self.plan.hp))

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size or self.budget.batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps; an epoch is one of the first role's rows."""
        if not self.leading:
            return 0
        rows = len(self.roles[next(iter(self.leading))])
        return self.plan.total_steps(rows, self.batch_size, self.budget.steps)

    def streams(self) -> dict[str, data_streams.Stream]:
        return {
            role: data_streams.Stream(
                self.roles[role], self.batch_size, shape, self.seed
            )
            for role, shape in self.leading.items()
        }

    @property
    def draws(self) -> str:
        """What tells its random numbers from others': all attacks at a seed share theirs.

        So that LoRA starts and drops alike, and attacks differ in nothing but their rule.
        """
        return "attacked" if self.name.startswith("attacked-") else self.name

    def keys(self) -> tuple[types.Rng, types.Rng]:
        """Keys of the first state, and of the steps."""
        name = zlib.crc32(self.draws.encode())
        rng = jax.random.fold_in(jax.random.key(self.seed), name)
        return jax.random.fold_in(rng, 0), jax.random.fold_in(rng, 1)

    def facts(self, trainable: int, length: int) -> dict[str, Any]:
        """What an account of the budget is made from."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "roles": {role: len(self.roles[role]) for role in self.leading},
            "leading": {role: list(shape) for role, shape in self.leading.items()},
            "trainable_parameters": trainable,
            "learning_rate_mass": learning_rate_mass(self.plan.hp, self.steps),
            "lora_scale": lora_scale(self.plan.hp),
            "sequence_length": length,
            "passes": self._passes(length),
            "shares": {
                role: float(share)
                for role, share in getattr(self.plan.hp, "shares", {}).items()
            },
        }

    def _passes(self, length: int) -> float | None:
        """What the method says that a step costs; it may depend on the model."""
        passes = getattr(self.plan.hp, "passes", None)
        return passes(self.lineage.current, length) if callable(passes) else passes


def learning_rate_mass(hp: types.Hparams, steps: int) -> float:
    """Sum of the learning rate over the updates: one axis of an attacker's budget."""
    if not steps or not hasattr(hp, "optimizer"):
        return 0.0
    table = np.asarray(hp.optimizer.schedule.table(steps), np.float64)
    updates = getattr(hp, "updates_per_step", 1)
    return float(updates * hp.optimizer.learning_rate * table[:steps].sum())


def lora_scale(hp: types.Hparams) -> float | None:
    """alpha / rank, or alpha / sqrt(rank); None where there is no such factor."""
    adapter = getattr(hp, "adapter", None)
    return float(adapter.scale()) if hasattr(adapter, "rank") else None
