"""Stages and the threat models that chain them; every finished stage is kept.

`open_weight`: pretrained -> aligned -> defended -> attacked; the attacker gets the
weights of a release and drops its intervention. `service`: the provider fine-tunes the
defended model on the user's rows with a method of its own, then may edit the result;
of an attack only the data recipe counts.
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
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import streams as data_streams
from ftdefense.data import world as worlds
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.models import transformer
from ftdefense.training import budgets
from ftdefense.training import checkpoint
from ftdefense.training import loop
from ftdefense.training import progress

# Scores parameters part-way through a stage; returns JSON-able columns.
Observer = Callable[[types.Params], dict[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A finished stage.

    Attributes:
      params: full parameters; an adapter is merged.
      key: digest of all that determined them.
      folder: where they and their log lie.
      log: one entry a chunk: step, mean metrics, and what the observer saw.
      facts: steps, rows and passes: what a budget is accounted from.
      lineage: where the stage started.
    """

    params: types.Params
    key: str
    folder: pathlib.Path | None
    log: list[dict[str, Any]]
    facts: dict[str, Any]
    lineage: types.Lineage | None = None


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


class Bench:
    """One world, one model, one work directory: runs stages, or finds them done."""

    def __init__(
        self,
        world: worlds.World,
        model: transformer.LanguageModel,
        workdir: pathlib.Path,
        defaults: budgets.Budgets,
        *,
        pretrained: Stage | None = None,
        aligned: Stage | None = None,
        world_seed: int = 0,
    ):
        """Prepares a bench.

        Args:
          defaults: budgets where a plan has none.
          pretrained: a user's own weights; otherwise the sandbox is pretrained.
          aligned: weights that are aligned already; otherwise `none` aligns them.
          world_seed: of the sandbox's pretraining.
        """
        self.world, self.model, self.defaults = world, model, defaults
        self._folder = workdir / "stages"
        self._given = {"pretrained": pretrained, "aligned": aligned}
        self._world_seed = world_seed
        self._fingerprint = world.fingerprint()

    # --- the lineage -----------------------------------------------------------------

    @functools.cache  # noqa: B019  A bench lives as long as the program.
    def pretrained(self, role: str = "with_skill") -> Stage:
        """The pretrained model, or its twin that `never` met the skill."""
        if self._given["pretrained"] is not None:
            if role != "with_skill":
                raise errors.UserError(
                    "the control `never` needs the sandbox's own pretraining; "
                    "leave --model out."
                )
            return self._given["pretrained"]
        budget, rate = self.defaults.pretraining, self.defaults.pretraining_rate
        method = lift.supervised(self.model, role)
        schedule = schedules.Schedule(0.1, 0.05, decay="cosine")
        plan = plans.Plan(
            lift.Hparams(optimizers.Optimizer(rate, schedule)),
            steps=budget.steps,
            batch_size=budget.batch_size,
        )
        rng = jax.random.key(self._world_seed)
        start = types.Lineage(jax.jit(self.model.init)(rng))
        return self._run(
            f"pretrained-{role}",
            method,
            plan,
            start,
            {role: self.world.pretraining[role]},
            self._world_seed,
            budget,
            parents=[],
        )

    @functools.cache  # noqa: B019
    def aligned(self, seed: int) -> Stage:
        """The aligned, undefended model: the stage of the defense `none`."""
        if self._given["aligned"] is not None:
            return self._given["aligned"]
        return self.defended("none", self.plan("defenses", "none"), seed)

    def defended(self, name: str, plan: plans.Plan, seed: int) -> Stage:
        """The release of one alignment-stage defense."""
        module = registry.load("defenses", name)
        starts_from = getattr(module, "STARTS_FROM", "pretrained")
        if starts_from == "aligned":
            aligned, pretrained = self.aligned(seed), self._maybe_pretrained()
            lineage = types.Lineage(
                aligned.params,
                aligned.params,
                None if pretrained is None else pretrained.params,
            )
            parents = [aligned.key, pretrained.key if pretrained else ""]
        else:
            role = "never" if starts_from == "never" else "with_skill"
            stage = self._given["aligned"] or self.pretrained(role)
            lineage = types.Lineage(stage.params, None, stage.params)
            parents = [stage.key]
        if hasattr(module, "prepare"):
            plan = dataclasses.replace(plan, hp=module.prepare(plan.hp, self.world))
        return self._run(
            f"defended-{name}",
            registry.method("defenses", name, self.model),
            plan,
            lineage,
            self.world.defender,
            seed,
            self.defaults.alignment,
            parents=[source_hash("defenses", name), *parents],
        )

    def attacked(
        self,
        name: str,
        plan: plans.Plan,
        defended: Stage,
        seed: int,
        observe: Observer | None = None,
        observer_key: Any = None,
    ) -> Stage:
        """An open-weight attack on a release."""
        return self._run(
            f"attacked-{name}",
            registry.method("attacks", name, self.model),
            plan,
            types.Lineage(defended.params),
            recipes.attacker_pools(self.world, plan.data),
            seed,
            self.defaults.attack,
            parents=[source_hash("attacks", name), defended.key, observer_key],
            observe=observe,
        )

    def served(
        self,
        provider: plans.Plan,
        data: recipes.Recipe,
        defended: Stage,
        seed: int,
        *,
        method: str = "sft",
        package: str = "attacks",
        edits: tuple[tuple[str, plans.Plan], ...] = (),
        observe: Observer | None = None,
        observer_key: Any = None,
    ) -> Stage:
        """Fine-tuning as a service: the provider's method on the user's rows.

        Args:
          provider: the provider's plan; its own data recipe is not used.
          data: the attack: what the user submits as role `user`.
          method, package: the provider's fine-tuning method.
          edits: post-fine-tuning defenses by name, applied in turn.
        """
        rows = recipes.attacker_pools(self.world, data)["user"]
        user = {**self.world.defender, "user": rows}
        if "user_refusal" in registry.method(package, method, self.model).streams(
            provider.hp
        ):
            user["user_refusal"] = recipes.refused(self.world, rows, seed)
        stage = self._run(
            f"served-{method}",
            registry.method(package, method, self.model),
            dataclasses.replace(provider, data=data),
            types.Lineage(defended.params, defended.params),
            user,
            seed,
            self.defaults.attack,
            parents=[source_hash(package, method), defended.key, observer_key],
            observe=observe,
        )
        for name, plan in edits:
            pretrained = self._maybe_pretrained()
            lineage = types.Lineage(
                stage.params,
                defended.params,
                None if pretrained is None else pretrained.params,
            )
            stage = self._run(
                f"edited-{name}",
                registry.method("defenses", name, self.model),
                plan,
                lineage,
                user,
                seed,
                self.defaults.attack,
                parents=[source_hash("defenses", name), stage.key],
            )
        return stage

    def plan(self, package: str, name: str, preset: str | None = None) -> plans.Plan:
        """A module's plan by preset name; `sandbox` unless told."""
        presets = registry.load(package, name).PRESETS
        preset = preset or "sandbox"
        if preset not in presets:
            kind = f"preset of {package.removesuffix('s')} {name}"
            raise errors.unknown(kind, preset, presets)
        return presets[preset]

    def _maybe_pretrained(self) -> Stage | None:
        if self._given["aligned"] is not None and self._given["pretrained"] is None:
            return None
        return self.pretrained()

    # --- one stage -------------------------------------------------------------------

    def _run(
        self,
        name: str,
        method: types.Method,
        plan: plans.Plan,
        lineage: types.Lineage,
        roles: Mapping[str, pools.Pool],
        seed: int,
        budget: budgets.Budget,
        *,
        parents: list[Any],
        observe: Observer | None = None,
    ) -> Stage:
        """Runs a stage, resumes it, or reads it: whichever the folder calls for."""
        leading = dict(method.streams(plan.hp))
        check_roles(name, leading, roles)
        batch_size = plan.batch_size or budget.batch_size
        rows = {role: len(roles[role]) for role in leading}
        steps = 0
        if leading:
            first = next(iter(rows.values()))
            steps = plan.total_steps(first, batch_size, budget.steps)
        resolved = {
            "stage": name,
            "plan": config.to_dict(plan),
            "steps": steps,
            "batch_size": batch_size,
            "seed": seed,
            "world": self._fingerprint,
            "model": config.to_dict(self.model.config),
            "parents": parents,
        }
        key = key_of(resolved)
        folder = self._folder / f"{name}-s{seed}-{key}"
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        finished = folder / "done.json"
        if finished.is_file():
            done = json.loads(finished.read_text())
            params = checkpoint.load_params(folder / "release", shapes)
            return Stage(params, key, folder, done["log"], done["facts"], lineage)

        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "config.json", resolved)
        started = time.monotonic()
        rng = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        state = loop.init(method, lineage, plan.hp, jax.random.fold_in(rng, 0), steps)
        trainable = _trainable(state)
        streams = {
            role: data_streams.Stream(roles[role], batch_size, shape, seed)
            for role, shape in leading.items()
        }
        bar = progress.Bar(f"{name} seed {seed}", steps)

        def on_chunk(at: loop.Progress) -> dict[str, Any]:
            bar.update(at)
            entry = {"step": at.done}
            entry |= {k: float(np.mean(v)) for k, v in at.metrics.items()}
            if observe is not None:
                entry |= observe(method.release(at.state, lineage).params)
            return entry

        log: list[dict[str, Any]] = []
        if steps:
            saver = checkpoint.Saver(folder / "checkpoint")
            state, log = loop.train(
                method,
                state,
                lineage,
                streams,
                jax.random.fold_in(rng, 1),
                steps,
                saver=saver,
                on_chunk=on_chunk,
            )
            saver.close()
        release = method.release(state, lineage)
        checkpoint.save_params(folder / "release", release.params)
        facts = {
            "steps": steps,
            "batch_size": batch_size,
            "roles": rows,
            "leading": {role: list(shape) for role, shape in leading.items()},
            "trainable_parameters": trainable,
            "learning_rate_mass": learning_rate_mass(plan.hp, steps),
            "lora_scale": lora_scale(plan.hp),
            "sequence_length": self.world.length,
        }
        seconds = time.monotonic() - started
        checkpoint.write_json(folder / "seconds.json", seconds)
        checkpoint.write_json(finished, {"log": log, "facts": facts})
        # The release is whole: what was needed to resume goes.
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        bar.close(seconds)
        return Stage(release.params, key, folder, log, facts, lineage)


def check_roles(
    name: str, wanted: Mapping[str, Any], given: Mapping[str, pools.Pool]
) -> None:
    """Refuses a method that asks for data which the run does not have."""
    missing = sorted(set(wanted) - set(given))
    if missing:
        providers = {
            "harmful": "--harmful",
            "alignment": "--benign and --refusals",
            "retain": "--benign and --refusals",
            "refusal": "--refusals",
            "benign": "--benign",
            "unrelated": "--benign",
            "user": "--harmful",
            "user_refusal": "--refusals",
            "adversary": "more prompts in --harmful",
            "heldout": "more prompts in --harmful",
            "heldout_refusal": "more prompts in --harmful and --refusals",
            "task": "--task",
        }
        flags = ", ".join(providers.get(role, f"a pool {role!r}") for role in missing)
        raise errors.UserError(
            f"{name} needs rows for {', '.join(missing)}, which this run does not "
            f"have; provide them with {flags}."
        )


def _trainable(state: types.State) -> int:
    return tree.size(state.params)


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
