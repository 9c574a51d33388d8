"""One stage of training: what determines it, and running it once and for all.

A finished stage is a folder named after a digest of all that determines it; asked for
again, it is read. One that was killed goes on where it stopped, to the same bits.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import inspect
import json
import pathlib
import shutil
import time
from typing import Any
import zlib

import jax
import numpy as np

import ftdefense
from ftdefense.core import config
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import streams as data_streams
from ftdefense.methods import plans
from ftdefense.training import budgets
from ftdefense.training import checkpoint
from ftdefense.training import loop
from ftdefense.training import progress
from ftdefense.training import requirements

# Looks at parameters part-way through a stage; returns JSON-able columns.
Observer = Callable[[types.Params], dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A finished stage.

    Attributes:
      params: full parameters; an adapter is merged.
      key: digest of all that determined them.
      folder: where they and their log lie.
      log: one entry a chunk: step, mean metrics, and what the observer saw.
      facts: steps, rows and passes: what a budget is accounted from.
    """

    params: types.Params
    key: str
    folder: pathlib.Path | None
    log: list[dict[str, Any]]
    facts: dict[str, Any]


def given(params: types.Params) -> Stage:
    """A user's own weights as a finished stage."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return Stage(jax.device_put(params), hashed.hexdigest()[:16], None, [], {})


def key_of(*parts: Any) -> str:
    """Digest of what determines a stage, this version of the code included."""
    return config.digest(ftdefense.__version__, loop.CHUNKS, *parts)


def source_hash(package: str, name: str) -> str:
    """Digest of a method's source: editing it makes its stages run again."""
    text = inspect.getsource(registry.load(package, name))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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

    def keys(self) -> tuple[types.Rng, types.Rng]:
        """Keys of the first state, and of the steps."""
        name = zlib.crc32(self.name.encode())
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
        }


def run(
    job: Job,
    root: pathlib.Path,
    model: types.Model,
    *,
    world: str,
    length: int,
    observe: Observer | None = None,
) -> Stage:
    """Runs a stage, resumes it, or reads it: whichever its folder calls for.

    Args:
      job: the stage.
      root: folder of all stages.
      model: for the shapes of its parameters.
      world: fingerprint of the data.
      length: tokens of a row.
      observe: looks at the parameters at the end of every chunk.
    """
    resolved = {
        "stage": job.name,
        "plan": config.to_dict(job.plan),
        "steps": job.steps,
        "batch_size": job.batch_size,
        "seed": job.seed,
        "world": world,
        "model": config.to_dict(model.config),
        "parents": list(job.parents),
    }
    key = key_of(resolved)
    folder = root / f"{job.name}-s{job.seed}-{key}"
    finished = folder / "done.json"
    if finished.is_file():
        done = json.loads(finished.read_text())
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = checkpoint.load_params(folder / "release", shapes)
        return Stage(params, key, folder, done["log"], done["facts"])

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", resolved)
    started = time.monotonic()
    first, rest = job.keys()
    state = loop.init(job.method, job.lineage, job.plan.hp, first, job.steps)
    facts = job.facts(tree.size(state.params), length)
    bar = progress.Bar(f"{job.name} seed {job.seed}", job.steps)

    def on_chunk(at: loop.Progress) -> dict[str, Any]:
        bar.update(at)
        entry = {"step": at.done}
        entry |= {k: float(np.mean(v)) for k, v in at.metrics.items()}
        if observe is not None:
            entry |= observe(job.method.release(at.state, job.lineage).params)
        return entry

    log: list[dict[str, Any]] = []
    if job.steps:
        saver = checkpoint.Saver(folder / "checkpoint")
        state, log = loop.train(
            job.method,
            state,
            job.lineage,
            job.streams(),
            rest,
            job.steps,
            saver=saver,
            on_chunk=on_chunk,
        )
        saver.close()
    release = job.method.release(state, job.lineage)
    checkpoint.save_params(folder / "release", release.params)
    seconds = time.monotonic() - started
    checkpoint.write_json(folder / "seconds.json", seconds)
    checkpoint.write_json(finished, {"log": log, "facts": facts})
    # The release is whole: what was needed to resume goes.
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    bar.close(seconds)
    return Stage(release.params, key, folder, log, facts)


def learning_rate_mass(hp: types.Hparams, steps: int) -> float:
    """Sum of the learning rate over the steps: one axis of an attacker's budget."""
    if not steps or not hasattr(hp, "optimizer"):
        return 0.0
    table = np.asarray(hp.optimizer.schedule.table(steps), np.float64)
    return float(hp.optimizer.learning_rate * table[:steps].sum())


def lora_scale(hp: types.Hparams) -> float | None:
    """alpha / rank; None for full parameters."""
    adapter = getattr(hp, "adapter", None)
    rank = getattr(adapter, "rank", None)
    return None if rank is None else float(adapter.alpha) / rank
