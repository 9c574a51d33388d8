"""Fine-tuning as a service: the provider trains the release on the user's rows.

The method is the provider's own, who may edit what comes out; of an attack only the rows
count, and the number of steps where it is asked for.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.methods import plans
from ftdefense.training import jobs
from ftdefense.training import pipeline
from ftdefense.training import requirements
from ftdefense.training import stages

# Package, name and plan of a provider's method; names and plans of its edits.
Provider = tuple[str, str, plans.Plan]
Edits = tuple[tuple[str, plans.Plan], ...]
# What a user submits as role `user`: by a recipe, or rows that were made for a release.
Rows = recipes.Recipe | pools.Pool


def submitted(
    bench: pipeline.Bench,
    attack: str,
    plan: plans.Plan,
    release: stages.Stage,
    seed: int,
) -> Rows:
    """What the user of a service submits: an attack's rows, all in one file.

    Objective and schedule are the provider's business; of an attack that draws harmful
    and benign batches side by side, half of each is left. An attack's `SUBMITS` names
    the roles that it submits where its `derive` makes some of them for the release.
    """
    module = registry.load("attacks", attack)
    if getattr(module, "SUBMITS", ()):
        made = module.derive(bench.model, bench.world, release.params, plan, seed)
        if not made.keys().isdisjoint(module.SUBMITS):
            found = {**recipes.attacker_pools(bench.world, plan.data), **made}
            return _one_file([found[role] for role in module.SUBMITS], bench)
    draws = registry.method("attacks", attack, bench.model).streams(plan.hp)
    if "benign" in draws and plan.data.poison_ratio == 1:
        return dataclasses.replace(plan.data, poison_ratio=0.5, filler="benign")
    return plan.data


def _one_file(parts: list[pools.Pool], bench: pipeline.Bench) -> pools.Pool:
    width = max(pool.tokens.shape[1] for pool in parts)
    parts = [pools.widen(pool, width, bench.world.pad_id) for pool in parts]
    return pools.concatenate(parts, "user")


def drawn(bench: pipeline.Bench, user: Rows) -> pools.Pool:
    """The rows of role `user`."""
    if isinstance(user, pools.Pool):
        return user
    return recipes.attacker_pools(bench.world, user)["user"]


def serve_job(
    bench: pipeline.Bench,
    provider: Provider,
    user: Rows,
    start: stages.Stage,
    first: stages.Stage,
    seed: int,
    *,
    steps: int = 0,
    title: str = "",
    observer_key: Any = None,
) -> jobs.Job:
    """A provider's method on the user's rows, not run yet.

    Args:
      user: what is submitted.
      start: where the method starts; `first`: the model before any fine-tuning.
      steps: that the user asks for; 0: the provider's.
    """
    package, name, plan = provider
    module = registry.load(package, name)
    if package == "defenses":
        requirements.weights(name, module, bench.has_pretrained)
    method = registry.method(package, name, bench.model)
    rows, made = drawn(bench, user), isinstance(user, pools.Pool)
    roles = {**bench.world.defender, "user": rows}
    if hasattr(module, "select"):
        roles |= module.select(plan.hp, bench.world.defender)
    if "user_refusal" in method.streams(plan.hp):
        roles["user_refusal"] = recipes.refused(bench.world, rows, seed)
    # A frame makes the user's rows longer; methods put rows of roles side by side.
    width = rows.tokens.shape[1]
    roles = {
        role: pools.widen(pool, width, bench.world.pad_id)
        for role, pool in roles.items()
    }
    before = bench.start()
    return jobs.Job(
        title or f"served-{name}",
        method,
        dataclasses.replace(
            plan,
            data=recipes.Recipe() if made else user,
            steps=steps or plan.steps,
        ),
        types.Lineage(start.params, first.params, before and before.params),
        roles,
        seed,
        bench.defaults.attack,
        parents=(
            stages.source_hash(package, name),
            start.key,
            observer_key,
            *([pools.digest(rows)] if made else []),
        ),
    )


def edit_job(
    bench: pipeline.Bench, edit: tuple[str, plans.Plan], *where: Any, **options: Any
) -> jobs.Job:
    """A post-fine-tuning defense of what a provider trained, not run yet.

    `where` and `options` are `serve_job`'s from `user` on.
    """
    name, plan = edit
    provider = ("defenses", name, plan)
    return serve_job(bench, provider, *where, title=f"edited-{name}", **options)


def served(
    bench: pipeline.Bench,
    provider: Provider,
    users: Sequence[Rows],
    defended: Sequence[stages.Stage],
    seeds: pipeline.Seeds,
    *,
    edits: Edits = (),
    steps: int = 0,
    observe: stages.Observer | None = None,
    observer_key: Any = None,
) -> list[stages.Stage]:
    """Fine-tuning as a service: the provider's method on the user's rows.

    Args:
      provider: package, name and plan of the provider's method; the plan's own data
        recipe is not used.
      users: the attack: what the user submits at each seed.
      edits: post-fine-tuning defenses by name, applied in turn.
      steps: that the user asks for; 0: the provider's.
    """
    members = [
        serve_job(
            bench, provider, user, d, d, seed, steps=steps, observer_key=observer_key
        )
        for user, d, seed in zip(users, defended, seeds, strict=True)
    ]
    served = bench.run(members, observe)
    final = served
    for edit in edits:
        places = zip(users, final, defended, seeds, strict=True)
        final = bench.run(
            [
                edit_job(bench, edit, *place, observer_key=observer_key)
                for place in places
            ]
        )
    # An edit is no part of the attack, whose budget and curve are the served one's.
    return [
        dataclasses.replace(last, log=stage.log, facts=stage.facts)
        for last, stage in zip(final, served, strict=True)
    ]
