"""Threat models as chains of stages; every finished stage is kept.

`open_weight`: pretrained -> aligned -> defended -> attacked; the attacker gets the
weights of a release and drops its intervention. `service`: the provider fine-tunes the
defended model on the user's rows with a method of its own, then may edit the result;
of an attack only the rows count.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax

from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import world as worlds
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.models import transformer
from ftdefense.training import budgets
from ftdefense.training import requirements
from ftdefense.training import stages

# Makes pools that only a run of the model can tell: (bench, seed) -> {role: Pool}.
Derive = Callable[["Bench", int], Mapping[str, pools.Pool]]


class Bench:
    """One world, one model, one work directory: runs stages, or finds them done."""

    def __init__(
        self,
        world: worlds.World,
        model: transformer.LanguageModel,
        workdir: pathlib.Path,
        defaults: budgets.Budgets,
        *,
        pretrained: stages.Stage | None = None,
        aligned: stages.Stage | None = None,
        world_seed: int = 0,
        derived: Mapping[str, Derive] | None = None,
    ):
        """Prepares a bench.

        Args:
          defaults: budgets where a plan has none.
          pretrained: a user's own weights; otherwise the sandbox is pretrained.
          aligned: weights that are aligned already; otherwise `none` aligns them.
          world_seed: of the sandbox's pretraining.
          derived: roles of the defender that are computed when a method asks for them.
        """
        self.world, self.model, self.defaults = world, model, defaults
        self._folder = workdir / "stages"
        self._given = {"pretrained": pretrained, "aligned": aligned}
        self._world_seed = world_seed
        self._fingerprint = world.fingerprint()
        self._derived = dict(derived or {})

    def run(
        self, job: stages.Job, observe: stages.Observer | None = None
    ) -> stages.Stage:
        """Runs a stage of this bench, or reads it."""
        return stages.run(
            job,
            self._folder,
            self.model,
            world=self._fingerprint,
            length=self.world.length,
            observe=observe,
        )

    def plan(self, package: str, name: str, preset: str | None = None) -> plans.Plan:
        """A module's plan by preset name; `sandbox` unless told."""
        presets = registry.load(package, name).PRESETS
        preset = preset or "sandbox"
        if preset not in presets:
            kind = f"preset of {package.removesuffix('s')} {name}"
            raise errors.unknown(kind, preset, presets)
        return presets[preset]

    def check(self, name: str, plan: plans.Plan) -> None:
        """Refuses a defense that this bench cannot run, before anything trains.

        Raises:
          UserError: naming the role or the weights that are missing, and their flag.
        """
        module = registry.load("defenses", name)
        requirements.weights(name, module, self._has_pretrained)
        known = {*self.world.defender, *self._derived, "user", "user_refusal"}
        method = registry.method("defenses", name, self.model)
        requirements.roles(name, method.streams(plan.hp), known)

    # --- the lineage -----------------------------------------------------------------

    @functools.cache  # noqa: B019  A bench lives as long as the program.
    def pretrained(self, role: str = "with_skill") -> stages.Stage:
        """The pretrained model, or its twin that `never` met the skill."""
        if self._given["pretrained"] is not None:
            if role != "with_skill":
                raise errors.UserError(
                    "the control `never` needs the sandbox's own pretraining; "
                    "leave --model out."
                )
            return self._given["pretrained"]
        schedule = schedules.Schedule(0.1, 0.05, decay="cosine")
        rate = self.defaults.pretraining_rate
        return self.run(
            stages.Job(
                f"pretrained-{role}",
                lift.supervised(self.model, role),
                plans.Plan(lift.Hparams(optimizers.Optimizer(rate, schedule))),
                types.Lineage(
                    jax.jit(self.model.init)(jax.random.key(self._world_seed))
                ),
                {role: self.world.pretraining[role]},
                self._world_seed,
                self.defaults.pretraining,
                parents=(),
            )
        )

    @functools.cache  # noqa: B019
    def aligned(self, seed: int) -> stages.Stage:
        """The aligned, undefended model: the stage of the defense `none`."""
        if self._given["aligned"] is not None:
            return self._given["aligned"]
        return self.defended("none", self.plan("defenses", "none"), seed)

    @property
    def _has_pretrained(self) -> bool:
        return self._given["aligned"] is None or self._given["pretrained"] is not None

    def _maybe_pretrained(self) -> stages.Stage | None:
        return self.pretrained() if self._has_pretrained else None

    # --- alignment, then the open-weight attacker ------------------------------------

    def defense_job(self, name: str, plan: plans.Plan, seed: int) -> stages.Job:
        """One alignment-stage defense, not run yet; what comes before it is."""
        module = registry.load("defenses", name)
        requirements.weights(name, module, self._has_pretrained)
        method = registry.method("defenses", name, self.model)
        starts_from = getattr(module, "STARTS_FROM", "pretrained")
        if starts_from == "aligned":
            aligned, pretrained = self.aligned(seed), self._maybe_pretrained()
            before = None if pretrained is None else pretrained.params
            lineage = types.Lineage(aligned.params, aligned.params, before)
            parents = [aligned.key, pretrained.key if pretrained else ""]
        else:
            role = "never" if starts_from == "never" else "with_skill"
            stage = self._given["aligned"] or self.pretrained(role)
            lineage = types.Lineage(stage.params, None, stage.params)
            parents = [stage.key]
        if hasattr(module, "prepare"):
            plan = dataclasses.replace(plan, hp=module.prepare(plan.hp, self.world))
        roles = dict(self.world.defender)
        for role in method.streams(plan.hp):
            if role in self._derived and role not in roles:
                roles |= self._derived[role](self, seed)
            if role in self._derived:
                parents.append(pools.digest(roles[role]))
        return stages.Job(
            f"defended-{name}",
            method,
            plan,
            lineage,
            roles,
            seed,
            self.defaults.alignment,
            parents=(stages.source_hash("defenses", name), *parents),
        )

    def defended(self, name: str, plan: plans.Plan, seed: int) -> stages.Stage:
        """The release of one alignment-stage defense."""
        return self.run(self.defense_job(name, plan, seed))

    def attack_job(
        self,
        name: str,
        plan: plans.Plan,
        defended: stages.Stage,
        seed: int,
        *,
        roles: Mapping[str, pools.Pool] | None = None,
        observer_key: Any = None,
    ) -> stages.Job:
        """An open-weight attack on a release, on the attacker's rows or on `roles`."""
        if roles is None:
            roles, digests = recipes.attacker_pools(self.world, plan.data), []
        else:
            digests = [pools.digest(roles[role]) for role in sorted(roles)]
        return stages.Job(
            f"attacked-{name}",
            registry.method("attacks", name, self.model),
            plan,
            types.Lineage(defended.params),
            roles,
            seed,
            self.defaults.attack,
            parents=(
                stages.source_hash("attacks", name),
                defended.key,
                observer_key,
                *digests,
            ),
        )

    def attacked(
        self,
        name: str,
        plan: plans.Plan,
        defended: stages.Stage,
        seed: int,
        *,
        roles: Mapping[str, pools.Pool] | None = None,
        observe: stages.Observer | None = None,
        observer_key: Any = None,
    ) -> stages.Stage:
        """An open-weight attack on a release; `observer_key` tells observers apart."""
        job = self.attack_job(
            name, plan, defended, seed, roles=roles, observer_key=observer_key
        )
        return self.run(job, observe)

    # --- fine-tuning as a service ----------------------------------------------------

    def served(
        self,
        provider: tuple[str, str, plans.Plan],
        user: recipes.Recipe,
        defended: stages.Stage,
        seed: int,
        *,
        edits: tuple[tuple[str, plans.Plan], ...] = (),
        observe: stages.Observer | None = None,
        observer_key: Any = None,
    ) -> stages.Stage:
        """Fine-tuning as a service: the provider's method on the user's rows.

        Args:
          provider: package, name and plan of the provider's method; the plan's own data
            recipe is not used.
          user: the attack: what the user submits as role `user`.
          edits: post-fine-tuning defenses by name, applied in turn.
        """
        package, name, plan = provider
        method = registry.method(package, name, self.model)
        rows = recipes.attacker_pools(self.world, user)["user"]
        roles = {**self.world.defender, "user": rows}
        if "user_refusal" in method.streams(plan.hp):
            roles["user_refusal"] = recipes.refused(self.world, rows, seed)
        before = self._maybe_pretrained()
        before = None if before is None else before.params
        stage = self.run(
            stages.Job(
                f"served-{name}",
                method,
                dataclasses.replace(plan, data=user),
                types.Lineage(defended.params, defended.params, before),
                roles,
                seed,
                self.defaults.attack,
                parents=(stages.source_hash(package, name), defended.key, observer_key),
            ),
            observe,
        )
        served = stage
        for name, plan in edits:
            requirements.weights(
                name, registry.load("defenses", name), self._has_pretrained
            )
            stage = self.run(
                stages.Job(
                    f"edited-{name}",
                    registry.method("defenses", name, self.model),
                    dataclasses.replace(plan, data=user),
                    types.Lineage(stage.params, defended.params, before),
                    roles,
                    seed,
                    self.defaults.attack,
                    parents=(stages.source_hash("defenses", name), stage.key),
                )
            )
        # An edit is no part of the attack, whose budget and curve are the served one's.
        return dataclasses.replace(stage, log=served.log, facts=served.facts)
