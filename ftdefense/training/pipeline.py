"""Open weights as a chain of stages, every one of which is kept.

pretrained -> aligned -> defended -> attacked; the attacker gets the weights of a release
and drops its intervention. The other threat model is in `training.serving`.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
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
from ftdefense.models import sharding
from ftdefense.models import transformer
from ftdefense.training import budgets
from ftdefense.training import jobs
from ftdefense.training import requirements
from ftdefense.training import stages

Seeds = tuple[int, ...]
# Makes pools that only a run of the model can tell: {role: Pool} for each seed.
Derive = Callable[["Bench", Seeds], Sequence[Mapping[str, pools.Pool]]]


class Bench:
    """One world, one model, one work directory: runs stages, or finds them done.

    Stages are run for several seeds at once: one after another or, with `together`, in
    one program. What comes before a stage is run for the same seeds.
    """

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
        together: bool = False,
        placement: sharding.Placement | None = None,
    ):
        """Prepares a bench.

        Args:
          defaults: budgets where a plan has none.
          pretrained: a user's own weights; otherwise the sandbox is pretrained.
          aligned: weights that are aligned already; otherwise `none` aligns them, by
            its preset or by `alignment`, which scripts may set before anything trains.
          world_seed: of the sandbox's pretraining.
          derived: roles of the defender that are computed when a method asks for them.
          together: whether the seeds of a stage are vmapped.
          placement: of its arrays on several devices; None: on one.
        """
        self.world, self.model, self.defaults = world, model, defaults
        self._given = {"pretrained": pretrained, "aligned": aligned}
        self._world_seed = world_seed
        self._together, self.placement = together, placement
        # How the undefended model is aligned, where it is not as presets say.
        self.alignment: plans.Plan | None = None
        self._store = stages.Store(
            workdir / "stages",
            model,
            world=world.fingerprint(),
            length=world.length,
            placement=placement,
        )
        self._derived = dict(derived or {})

    def run(
        self, members: Sequence[jobs.Job], observe: stages.Observer | None = None
    ) -> list[stages.Stage]:
        """Runs the same stage at several seeds, or reads what they became."""
        if self._together:
            return self._store.run_together(members, observe)
        return [self._store.run(job, observe) for job in members]

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
        requirements.weights(name, module, self.has_pretrained)
        known = {*self.world.defender, *self._derived, "user", "user_refusal"}
        method = registry.method("defenses", name, self.model)
        requirements.roles(name, method.streams(plan.hp), known)
        if hasattr(module, "select"):
            module.select(plan.hp, self.world.defender)

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
        job = jobs.Job(
            f"pretrained-{role}",
            lift.supervised(self.model, role),
            plans.Plan(lift.Hparams(optimizers.Optimizer(rate, schedule))),
            types.Lineage(self.model.init(jax.random.key(self._world_seed))),
            {role: self.world.pretraining[role]},
            self._world_seed,
            self.defaults.pretraining,
            parents=(),
        )
        return self._store.run(job)

    @functools.cache  # noqa: B019
    def aligned(self, seeds: Seeds) -> list[stages.Stage]:
        """The aligned, undefended models: the stage of the defense `none`."""
        plan = self.alignment or self.plan("defenses", "none")
        return self.defended("none", plan, seeds)

    @property
    def has_pretrained(self) -> bool:
        """Whether there are weights before alignment."""
        return self._given["aligned"] is None or self._given["pretrained"] is not None

    def start(self) -> stages.Stage | None:
        """The pretrained model, if this bench has one: what most stages start from."""
        return self.pretrained() if self.has_pretrained else None

    # --- alignment, then the attacker ------------------------------------------------

    def defense_jobs(self, name: str, plan: plans.Plan, seeds: Seeds) -> list[jobs.Job]:
        """One alignment-stage defense, not run yet; what comes before it is."""
        module = registry.load("defenses", name)
        requirements.weights(name, module, self.has_pretrained)
        method = registry.method("defenses", name, self.model)
        if hasattr(module, "prepare"):
            plan = dataclasses.replace(plan, hp=module.prepare(plan.hp, self.world))
        starts = self._starts(getattr(module, "STARTS_FROM", "pretrained"), seeds)
        derived = self._derive(method.streams(plan.hp), seeds)
        return [
            jobs.Job(
                f"defended-{name}",
                method,
                plan,
                lineage,
                {**self.world.defender, **own},
                seed,
                self.defaults.alignment,
                parents=(
                    stages.source_hash("defenses", name),
                    *parents,
                    *(pools.digest(own[role]) for role in sorted(own)),
                ),
            )
            for seed, (lineage, parents), own in zip(
                seeds, starts, derived, strict=True
            )
        ]

    def _starts(
        self, starts_from: str, seeds: Seeds
    ) -> list[tuple[types.Lineage, list[str]]]:
        """Lineage and parents of an alignment-stage defense at each seed."""
        if starts_from == "aligned":
            before = self.start()
            params, key = (before.params, before.key) if before else (None, "")
            return [
                (types.Lineage(a.params, a.params, params), [a.key, key])
                for a in self.aligned(seeds)
            ]
        role = "never" if starts_from == "never" else "with_skill"
        stage = self._given["aligned"] or self.pretrained(role)
        lineage = types.Lineage(stage.params, None, stage.params)
        return [(lineage, [stage.key])] * len(seeds)

    def _derive(
        self, wanted: Iterable[str], seeds: Seeds
    ) -> list[dict[str, pools.Pool]]:
        """Those roles of the defender that a run of the model has to tell."""
        makers = {self._derived[role] for role in wanted if role in self._derived}
        found: list[dict[str, pools.Pool]] = [{} for _ in seeds]
        for maker in makers:
            for own, made in zip(found, maker(self, seeds), strict=True):
                own.update(made)
        return found

    def defended(self, name: str, plan: plans.Plan, seeds: Seeds) -> list[stages.Stage]:
        """The releases of one alignment-stage defense.

        Weights that are aligned already are `none`, as they are.
        """
        if name == "none" and self._given["aligned"] is not None:
            return [self._given["aligned"]] * len(seeds)
        return self.run(self.defense_jobs(name, plan, seeds))

    def attack_job(
        self,
        name: str,
        plan: plans.Plan,
        defended: stages.Stage,
        seed: int,
        *,
        roles: Mapping[str, pools.Pool] | None = None,
        observer_key: Any = None,
    ) -> jobs.Job:
        """An open-weight attack on a release, on the attacker's rows or on `roles`.

        `observer_key` tells observers apart, whose columns the stage keeps.
        """
        module = registry.load("attacks", name)
        if hasattr(module, "prepare"):
            plan = dataclasses.replace(plan, hp=module.prepare(plan.hp, self.world))
        computed = {} if roles is None else dict(roles)
        if roles is None:
            roles = recipes.attacker_pools(self.world, plan.data)
        if hasattr(module, "derive"):
            computed |= module.derive(
                self.model, self.world, defended.params, plan, seed
            )
        digests = [pools.digest(computed[role]) for role in sorted(computed)]
        known = self._known_to(getattr(module, "NEEDS", ()), seed)
        digests += [stage.key for stage in known.values()]
        return jobs.Job(
            f"attacked-{name}",
            registry.method("attacks", name, self.model),
            plan,
            types.Lineage(
                defended.params, **{role: stage.params for role, stage in known.items()}
            ),
            {**roles, **computed},
            seed,
            self.defaults.attack,
            parents=(
                stages.source_hash("attacks", name),
                defended.key,
                observer_key,
                *digests,
            ),
        )

    def _known_to(self, needs: Iterable[str], seed: int) -> dict[str, stages.Stage]:
        """The weights besides the release that an attack's `NEEDS` says it holds."""
        found = {}
        for need in needs:
            if need == "pretrained":
                found[need] = self.pretrained()
            elif need == "aligned":
                (found[need],) = self.aligned((seed,))
            else:
                found[need] = self.twin(seed)
        return found

    @functools.cache  # noqa: B019
    def twin(self, seed: int) -> stages.Stage:
        """The undefended model after plain fine-tuning on the attacker's rows."""
        plan = self.plan("attacks", "sft")
        return self.run([self.attack_job("sft", plan, *self.aligned((seed,)), seed)])[0]

    def attacked(
        self,
        name: str,
        plan: plans.Plan,
        defended: Sequence[stages.Stage],
        seeds: Seeds,
        *,
        observe: stages.Observer | None = None,
        **options: Any,
    ) -> list[stages.Stage]:
        """An open-weight attack on the release of each seed; options of `attack_job`."""
        pairs = zip(defended, seeds, strict=True)
        return self.run(
            [self.attack_job(name, plan, d, seed, **options) for d, seed in pairs],
            observe,
        )
