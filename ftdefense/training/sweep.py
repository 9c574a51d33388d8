"""Many settings and seeds of one attack in one compiled program."""

from collections.abc import Sequence
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import config
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.data import streams as data_streams
from ftdefense.methods import plans
from ftdefense.training import loop
from ftdefense.training import pipeline
from ftdefense.training import progress


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


def groups(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members of each program, in the order of first appearance."""
    found: dict[str, list[int]] = {}
    for i, member in enumerate(members):
        found.setdefault(static_key(member.plan), []).append(i)
    return list(found.values())


def attack(
    bench: pipeline.Bench,
    name: str,
    members: Sequence[Member],
    defended: pipeline.Stage,
) -> list[Outcome]:
    """Attacks one release with every member; one compilation per static group.

    A member draws the data and the keys that `Bench.attacked` would at its seed, so it
    ends where a single run does. One that diverges is marked, and stops nobody else.
    """
    outcomes: list[Outcome | None] = [None] * len(members)
    for group in groups(members):
        done = _group(bench, name, [members[i] for i in group], defended)
        for i, outcome in zip(group, done, strict=True):
            outcomes[i] = outcome
    return outcomes


def _group(bench, name, members, defended) -> list[Outcome]:
    method = registry.method("attacks", name, bench.model)
    lineage = types.Lineage(defended.params)
    plan = members[0].plan
    roles = recipes.attacker_pools(bench.world, plan.data)
    leading = dict(method.streams(plan.hp))
    pipeline.check_roles(name, leading, roles)
    budget = bench.defaults.attack
    batch_size = plan.batch_size or budget.batch_size
    first = len(roles[next(iter(leading))])
    steps = plan.total_steps(first, batch_size, budget.steps)
    hp = jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]),
        *(member.plan.hp for member in members),
    )
    keys = [
        jax.random.fold_in(
            jax.random.key(member.seed), zlib.crc32(f"attacked-{name}".encode())
        )
        for member in members
    ]
    starts, runs = (
        jnp.stack([jax.random.fold_in(key, i) for key in keys]) for i in (0, 1)
    )
    streams = [
        {
            role: data_streams.Stream(roles[role], batch_size, shape, member.seed)
            for role, shape in leading.items()
        }
        for member in members
    ]
    bar = progress.Bar(f"{name} x {len(members)}", steps)
    logs: list[list[dict[str, float]]] = [[] for _ in members]

    def on_chunk(at: loop.Progress) -> None:
        bar.update(at)
        for i, log in enumerate(logs):
            means = {k: float(np.mean(v[i])) for k, v in at.metrics.items()}
            log.append({"step": at.done, **means})

    state = loop.init(method, lineage, hp, starts, steps, mapped=True)
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
