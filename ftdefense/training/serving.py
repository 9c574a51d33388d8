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


def serve_job(
    bench: pipeline.Bench,
    provider: Provider,
    user: recipes.Recipe,
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
      user: what the user submits as role `user`.
      start: where the method starts; `first`: the model before any fine-tuning.
      steps: that the user asks for; 0: the provider's.
    """
    package, name, plan = provider
    module = registry.load(package, name)
    if package == "defenses":
        requirements.weights(name, module, bench.has_pretrained)
    method = registry.method(package, name, bench.model)
    rows = recipes.attacker_pools(bench.world, user)["user"]
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
        dataclasses.replace(plan, data=user, steps=steps or plan.steps),
        types.Lineage(start.params, first.params, before and before.params),
        roles,
        seed,
        bench.defaults.attack,
        parents=(stages.source_hash(package, name), start.key, observer_key),
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
    user: recipes.Recipe,
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
      user: the attack: what the user submits as role `user`.
      edits: post-fine-tuning defenses by name, applied in turn.
      steps: that the user asks for; 0: the provider's.
    """
    members = [
        serve_job(
            bench, provider, user, d, d, seed, steps=steps, observer_key=observer_key
        )
        for d, seed in zip(defended, seeds, strict=True)
    ]
    served = bench.run(members, observe)
    final = served
    for edit in edits:
        places = zip(final, defended, seeds, strict=True)
        final = bench.run(
            [
                edit_job(bench, edit, user, *place, observer_key=observer_key)
                for place in places
            ]
        )
    # An edit is no part of the attack, whose budget and curve are the served one's.
    return [
        dataclasses.replace(last, log=stage.log, facts=stage.facts)
        for last, stage in zip(final, served, strict=True)
    ]
