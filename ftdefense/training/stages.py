"""Finished stages: each is run once and for all.

A finished stage is a folder named after a digest of all that determines it; asked for
again, it is read. One that was killed goes on where it stopped, to the same bits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

import ftdefense
from ftdefense.core import config
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.models import sharding
from ftdefense.training import checkpoint
from ftdefense.training import jobs as training_jobs
from ftdefense.training import loop
from ftdefense.training import progress
from ftdefense.training import together

_DONE = "done.json"  # Written last: a stage without it is not finished.
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


def given(params: types.Params, placement: sharding.Placement | None = None) -> Stage:
    """A user's own weights as a finished stage, spread over a mesh if there is one."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        hashed.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    placed = placement.parameters(params) if placement else jax.device_put(params)
    return Stage(placed, hashed.hexdigest()[:16], None, [], {})


def key_of(*parts: Any) -> str:
    """Digest of what determines a stage, this version of the code included."""
    precision = jax.config.jax_default_matmul_precision
    return config.digest(ftdefense.__version__, loop.CHUNKS, precision, *parts)


def source_hash(package: str, name: str) -> str:
    """Digest of a method's source: editing it makes its stages run again."""
    text = inspect.getsource(registry.load(package, name))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
    """The folder of all stages of one world and one model."""

    def __init__(
        self,
        root: pathlib.Path,
        model: types.Model,
        *,
        world: str,
        length: int,
        placement: sharding.Placement | None = None,
    ):
        """Prepares a store.

        Args:
          root: folder of all stages.
          model: for its shape, and the shapes of its parameters.
          world: fingerprint of the data.
          length: tokens of a row.
          placement: on several devices; None: on one.
        """
        self._root, self._model, self._placement = root, model, placement
        self._world, self._length = world, length

    def run(self, job: training_jobs.Job, observe: Observer | None = None) -> Stage:
        """Runs a stage, resumes it, or reads it: whichever its folder calls for.

        `observe` looks at the parameters at the end of every chunk.
        """
        folder, key = self._claim(job)
        with _lock(folder):
            return self._run(job, folder, key, observe)

    def _run(self, job, folder, key, observe) -> Stage:
        if (folder / _DONE).is_file():
            return self._read(folder, key)
        started = time.monotonic()
        first, rest = job.keys()
        lineage = job.lineage
        if self._placement:
            lineage = self._placement.parameters(lineage)
        state = loop.init(
            job.method,
            lineage,
            job.plan.hp,
            first,
            job.steps,
            placement=self._placement,
        )
        trainable = tree.size(state.params)
        bar = progress.Bar(f"{job.name} seed {job.seed}", job.steps)

        def on_chunk(at: loop.Progress) -> dict[str, Any]:
            bar.update(at)
            entry = {"step": at.done}
            entry |= {k: float(np.mean(v)) for k, v in at.metrics.items()}
            if observe is not None:
                entry |= observe(job.method.release(at.state, lineage).params)
            return entry

        log: list[dict[str, Any]] = []
        if job.steps:
            saver = checkpoint.Saver(folder / "checkpoint")
            state, log = loop.train(
                job.method,
                state,
                lineage,
                job.streams(),
                rest,
                job.steps,
                saver=saver,
                on_chunk=on_chunk,
                placement=self._placement,
            )
            saver.close()
        params = job.method.release(state, lineage).params
        seconds = time.monotonic() - started
        stage = self._finish(job, folder, key, params, log, trainable, seconds)
        bar.close(seconds)
        return stage

    def run_together(
        self, jobs: Sequence[training_jobs.Job], observe: Observer | None = None
    ) -> list[Stage]:
        """Runs the jobs of several seeds in one program, or reads what they became.

        A member's key says with whom it ran: it ends within rounding of a single run,
        not at its bits.
        """
        if len(jobs) == 1:
            return [self.run(jobs[0], observe)]
        company = [job.seed for job in jobs]
        claimed = [self._claim(job, company) for job in jobs]
        with _lock(claimed[0][0]):
            return self._run_together(jobs, claimed, observe)

    def _run_together(self, jobs, claimed, observe) -> list[Stage]:
        if not all((folder / _DONE).is_file() for folder, _ in claimed):
            started = time.monotonic()
            shared = claimed[0][0] / "checkpoint"
            saver = checkpoint.Saver(shared)
            outcomes = together.run(
                jobs, saver=saver, observe=observe, placement=self._placement
            )
            saver.close()
            seconds = (time.monotonic() - started) / len(jobs)
            # The first folder holds what all resume from, and so is finished last.
            rest = list(zip(jobs, claimed, outcomes, strict=True))[::-1]
            for job, (folder, key), outcome in rest:
                self._finish(
                    job,
                    folder,
                    key,
                    outcome.params,
                    outcome.log,
                    outcome.trainable,
                    seconds,
                )
        return [self._read(folder, key) for folder, key in claimed]

    def _claim(
        self, job: training_jobs.Job, company: Sequence[int] = ()
    ) -> tuple[pathlib.Path, str]:
        """Folder and key of a job; `company` are the seeds that it runs together with."""
        resolved = {
            "stage": job.name,
            "plan": config.to_dict(job.plan),
            "steps": job.steps,
            "batch_size": job.batch_size,
            "seed": job.seed,
            "world": self._world,
            "model": config.to_dict(self._model.config),
            "parents": list(job.parents),
        }
        if job.draws != job.name:
            resolved["draws"] = job.draws
        if company:
            resolved["together"] = list(company)
        key = key_of(resolved)
        # A method of a user's own is named by its path, which is no name for a folder.
        kind, dash, path = job.name.partition("-")
        title = f"{kind}{dash}{pathlib.PurePath(path).stem}"
        folder = self._root / f"{title}-s{job.seed}-{key}"
        if not (folder / _DONE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(folder / "config.json", resolved)
        return folder, key

    def _read(self, folder: pathlib.Path, key: str) -> Stage:
        done = json.loads((folder / _DONE).read_text())
        shapes = jax.eval_shape(self._model.init, jax.random.key(0))
        if self._placement:  # No device holds all of it, not even for a moment.
            shapes = self._placement.shapes(shapes)
        params = checkpoint.load_params(folder / "release", shapes)
        return Stage(params, key, folder, done["log"], done["facts"])

    def _finish(
        self, job, folder, key, params, log, trainable: int, seconds: float
    ) -> Stage:
        """Writes a release; `done.json` comes last, and says that all is there."""
        checkpoint.save_params(folder / "release", params)
        facts = job.facts(trainable, self._length)
        checkpoint.write_json(folder / "seconds.json", seconds)
        checkpoint.write_json(folder / _DONE, {"log": log, "facts": facts})
        # The release is whole: what was needed to resume goes.
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return Stage(params, key, folder, log, facts)


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from the same stage: they wait, and find it finished."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
