"""Many settings and seeds of one stage in one compiled program."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import config
from ftdefense.core import types
from ftdefense.methods import plans
from ftdefense.training import loop
from ftdefense.training import pipeline
from ftdefense.training import progress
from ftdefense.training import stages


class Member(NamedTuple):
    """One setting at one seed."""

    plan: plans.Plan
    seed: int


class Outcome(NamedTuple):
    """What a member ended as; `params` are full, `log` has one entry a chunk."""

    params: types.Params
    log: list[dict[str, float]]
    steps: int
    diverged: bool


def static_key(plan: plans.Plan) -> str:
    """Equal for plans that one program can serve: only traced numbers differ."""
    rest = {k: v for k, v in vars(plan).items() if k not in ("hp", "source")}
    return config.digest(str(jax.tree.structure(plan.hp)), config.to_dict(rest))


def groups(jobs: Sequence[stages.Job]) -> list[list[int]]:
    """Indices of the jobs of each program, in the order of first appearance.

    Jobs of a group share the method, the shapes, and the lineage that they start from.
    """
    found: dict[tuple, list[int]] = {}
    for i, job in enumerate(jobs):
        start = tuple(map(id, jax.tree.leaves(job.lineage)))
        key = (job.method, static_key(job.plan), job.steps, start)
        found.setdefault(key, []).append(i)
    return list(found.values())


def run(jobs: Sequence[stages.Job]) -> list[Outcome]:
    """Runs every job; one compilation per group.

    A job draws the data and the keys that it would alone, so it ends where a single run
    does. One that diverges is marked, and stops nobody else. Nothing is written.
    """
    outcomes: list[Outcome | None] = [None] * len(jobs)
    for group in groups(jobs):
        done = _together([jobs[i] for i in group])
        for i, outcome in zip(group, done, strict=True):
            outcomes[i] = outcome
    return outcomes


def attack(
    bench: pipeline.Bench,
    name: str,
    members: Sequence[Member],
    defended: stages.Stage,
) -> list[Outcome]:
    """Attacks one release with every member."""
    return run([bench.attack_job(name, m.plan, defended, m.seed) for m in members])


def _together(jobs: list[stages.Job]) -> list[Outcome]:
    method, lineage, steps = jobs[0].method, jobs[0].lineage, jobs[0].steps
    hp = jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]),
        *(job.plan.hp for job in jobs),
    )
    starts, runs = (
        jnp.stack(keys) for keys in zip(*(j.keys() for j in jobs), strict=True)
    )
    bar = progress.Bar(f"{jobs[0].name} x {len(jobs)}", steps)
    logs: list[list[dict[str, float]]] = [[] for _ in jobs]

    def on_chunk(at: loop.Progress) -> None:
        bar.update(at)
        for i, log in enumerate(logs):
            means = {k: float(np.mean(v[i])) for k, v in at.metrics.items()}
            log.append({"step": at.done, **means})

    state = loop.init(method, lineage, hp, starts, steps, mapped=True)
    if steps:
        streams = [job.streams() for job in jobs]
        state, _ = loop.train(
            method, state, lineage, streams, runs, steps, on_chunk=on_chunk, mapped=True
        )
    bar.close(0.0)
    outcomes = []
    for i, log in enumerate(logs):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        params = method.release(one, lineage).params
        finite = all(np.isfinite(v) for entry in log for v in entry.values())
        outcomes.append(Outcome(params, log, steps, not finite))
    return outcomes
