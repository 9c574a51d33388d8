"""Many settings and seeds of one stage in one compiled program."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import plans
from ftdefense.models import sharding
from ftdefense.training import checkpoint
from ftdefense.training import jobs
from ftdefense.training import loop
from ftdefense.training import progress


class Outcome(NamedTuple):
    """What a member ended as.

    Attributes:
      params: full parameters.
      log: one entry a chunk.
      trainable: parameters that trained.
      diverged: the end of the first chunk with a number that is not finite, or None.
    """

    params: types.Params
    log: list[dict[str, Any]]
    trainable: int
    diverged: int | None


def static_key(plan: plans.Plan) -> str:
    """Equal for plans that one program can serve: only traced numbers differ."""
    rest = {k: v for k, v in vars(plan).items() if k not in ("hp", "source")}
    return config.digest(str(jax.tree.structure(plan.hp)), config.to_dict(rest))


def groups(members: Sequence[jobs.Job]) -> list[list[int]]:
    """Indices of the jobs of each program, in the order of first appearance."""
    found: dict[tuple, list[int]] = {}
    for i, job in enumerate(members):
        key = (job.method, static_key(job.plan), job.steps, job.batch_size)
        key += (str(jax.tree.structure(job.lineage)),)
        key += tuple(job.roles[role].tokens.shape[1] for role in job.leading)
        found.setdefault(key, []).append(i)
    return list(found.values())


def sweep(
    members: Sequence[jobs.Job], placement: sharding.Placement | None = None
) -> list[Outcome]:
    """Runs every job, in as few programs as there are groups. Nothing is written.

    A job draws the data and the keys that it would alone, so it ends where a single run
    does. One that diverges is marked, and stops nobody else.
    """
    outcomes: list[Outcome | None] = [None] * len(members)
    for group in groups(members):
        done = run([members[i] for i in group], placement=placement)
        for i, outcome in zip(group, done, strict=True):
            outcomes[i] = outcome
    return outcomes


def run(
    members: Sequence[jobs.Job],
    *,
    saver: checkpoint.Saver | None = None,
    observe: Callable[[types.Params], dict[str, Any]] | None = None,
    placement: sharding.Placement | None = None,
) -> list[Outcome]:
    """Runs jobs of one group in one program: the scan over steps, vmapped.

    Args:
      members: of one method and one static shape; they share a lineage if it is the same.
      saver: where all of them are saved together, and resumed from. What is to be kept
        must be finite: a member that diverges stops them all.
      observe: looks at each member's parameters at the end of every chunk.
      placement: of each member's arrays on several devices; None: on one.

    Raises:
      NonFiniteError: with `saver`; names member, step and metric.
    """
    method, steps = members[0].method, members[0].steps
    lineage, mapped = _lineage(members)
    if placement:
        lineage = placement.parameters(lineage)
    hp = jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]),
        *(job.plan.hp for job in members),
    )
    keys = [job.keys() for job in members]
    starts, runs = (jnp.stack(part) for part in zip(*keys, strict=True))
    started = time.monotonic()
    bar = progress.Bar(f"{members[0].name} x {len(members)}", steps)

    def member(state: types.State, i: int) -> types.Params:
        one = jax.tree.map(lambda leaf: leaf[i], state)
        return method.release(one, members[i].lineage).params

    def on_chunk(at: loop.Progress) -> list[dict[str, Any]]:
        bar.update(at)
        entries = []
        for i in range(len(members)):
            means = {k: float(np.mean(v[i])) for k, v in at.metrics.items()}
            entry = {"step": at.done, **means}
            if saver is not None:
                _refuse(members[i], entry, saver)
            if observe is not None:
                entry |= observe(member(at.state, i))
            entries.append(entry)
        return entries

    state = loop.init(
        method, lineage, hp, starts, steps, mapped=mapped, placement=placement
    )
    log: list[list[dict[str, Any]]] = []
    if steps:
        state, log = loop.train(
            method,
            state,
            lineage,
            [job.streams() for job in members],
            runs,
            steps,
            saver=saver,
            on_chunk=on_chunk,
            mapped=mapped,
            placement=placement,
        )
    bar.close(time.monotonic() - started)
    trainable = tree.size(state.params) // len(members)
    outcomes = []
    for i in range(len(members)):
        entries = [chunk[i] for chunk in log]
        outcomes.append(
            Outcome(member(state, i), entries, trainable, _first_bad(entries))
        )
    return outcomes


def _first_bad(log: Sequence[dict[str, Any]]) -> int | None:
    return next((entry["step"] for entry in log if _bad(entry)), None)


def _bad(entry: dict[str, Any]) -> list[str]:
    return [k for k, v in entry.items() if isinstance(v, float) and not np.isfinite(v)]


def _refuse(job: jobs.Job, entry: dict[str, Any], saver: checkpoint.Saver) -> None:
    bad = _bad(entry)
    if bad:
        kept = saver.last()
        where = (
            f"the last good checkpoint is {kept}" if kept else "nothing was saved yet"
        )
        raise errors.NonFiniteError(
            f"{job.name} at seed {job.seed}: {bad[0]} is {entry[bad[0]]} by step "
            f"{entry['step']}; {where}. Lower optimizer.learning_rate or set "
            "optimizer.clip, then run again."
        )


def _lineage(members: Sequence[jobs.Job]) -> tuple[types.Lineage, bool | str]:
    """The lineage that all share, or theirs stacked."""
    leaves = [tuple(map(id, jax.tree.leaves(job.lineage))) for job in members]
    if len(set(leaves)) == 1:
        return members[0].lineage, True
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    return stack(*(job.lineage for job in members)), loop.STACKED
