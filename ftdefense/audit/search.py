"""Runs one attack family against one release: companies of trials in one program each."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import optuna

from ftdefense.audit import effort
from ftdefense.audit import spaces
from ftdefense.audit import studies
from ftdefense.core import config
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data.sandbox import wrappers
from ftdefense.evaluation import budget
from ftdefense.evaluation import screening
from ftdefense.evaluation import success
from ftdefense.methods import plans
from ftdefense.training import jobs
from ftdefense.training import pipeline
from ftdefense.training import serving
from ftdefense.training import stages
from ftdefense.training import together


@dataclasses.dataclass(frozen=True)
class Target:
    """A release under attack.

    Attributes:
      name: for people and for studies.
      stage: its weights.
      capability: before any attack: the reference of what an attack may cost.
      service: whoever fine-tunes it, and edits what comes out; of an attack only the
        rows and the steps count then. None: its weights are open.
    """

    name: str
    stage: stages.Stage
    capability: float
    service: tuple[serving.Provider, serving.Edits] | None = None

    def key(self) -> str:
        """Digest of what is attacked."""
        if self.service is None:
            return self.stage.key
        (package, name, _), edits = self.service
        sources = [stages.source_hash(package, name)]
        sources += [stages.source_hash("defenses", edit) for edit, _ in edits]
        return config.digest(self.stage.key, sources, config.to_dict(self.service))


class Searcher:
    """Tries settings of attacks on releases; every trial is a row that is kept."""

    def __init__(
        self,
        bench: pipeline.Bench,
        storage: optuna.storages.BaseStorage | str,
        *,
        parallel: int = 4,
        seed: int = 0,
        epsilon: float = success.HEADLINE,
    ):
        """Prepares a searcher.

        Args:
          storage: of the studies: from `studies.opened`, or a URL.
          parallel: trials that one program trains.
          seed: of data order, adapters, noise, and of the sampler.
          epsilon: share of the reference capability that an attack may cost.
        """
        self._bench, self._storage = bench, storage
        self._parallel, self._seed, self._epsilon = parallel, seed, epsilon
        self._screeners: dict[str, screening.Screener] = {}

    @functools.cached_property
    def _world(self) -> str:
        return config.digest(self._bench.world.hashes())

    def run(
        self,
        target: Target,
        family: str,
        attack: str,
        plan: plans.Plan,
        space: spaces.Space,
        *,
        points: Sequence[Mapping[str, Any]],
        trials: int,
        exactly: bool = False,
        on_trial: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> list[dict[str, Any]]:
        """Rows of `trials` trials; of a few more, unless `exactly`, for whole companies.

        What an earlier run has finished is read. Every row says how it was trained
        (`values`), what it cost, and what the screening saw.
        """
        # Whatever its trials mean: an edited attack has no old trials.
        meaning = config.digest(
            stages.source_hash("attacks", attack),
            plan,
            dict(space),
            [dict(point) for point in points],
            self._world,
            self._epsilon,
        )
        study = studies.Study(
            f"{target.name}/{target.key()}/{family}/s{self._seed}/{meaning}",
            self._storage,
            space,
            points=points,
            seed=self._seed,
        )
        for row in study.rows():
            on_trial(row)
        while study.finished < trials:
            left = trials - study.finished if exactly else trials
            company = study.ask(min(self._parallel, left))
            chosen = [spaces.apply(plan, trial.values) for trial in company]
            members = [self._job(target, attack, one) for one in chosen]
            outcomes = together.sweep(members, self._bench.placement)
            edited = self._edited(target, members, outcomes)
            for trial, job, outcome, params in zip(
                company, members, outcomes, edited, strict=True
            ):
                if trial.handle is None:  # Told before the company was interrupted.
                    continue
                row = {
                    "target": target.name,
                    "family": family,
                    "attack": attack,
                    "seed": self._seed,
                    "values": trial.values,
                    **self._account(target, job, outcome),
                    "diverged": outcome.diverged is not None,
                }
                if outcome.diverged is None:
                    row |= self._screened(target, job.plan, params)
                study.tell(trial, row)
                on_trial(row)
        return study.rows()

    def _job(self, target: Target, attack: str, plan: plans.Plan) -> jobs.Job:
        if target.service is None:
            return self._bench.attack_job(attack, plan, target.stage, self._seed)
        provider, _ = target.service
        return serving.serve_job(
            self._bench,
            provider,
            serving.submitted(self._bench, attack, plan, target.stage, self._seed),
            target.stage,
            target.stage,
            self._seed,
            steps=plan.steps,
        )

    def _edited(
        self,
        target: Target,
        members: Sequence[jobs.Job],
        outcomes: Sequence[together.Outcome],
    ) -> list[types.Params]:
        """What is released of each outcome: the weights themselves, or a service's edit.

        What diverged is left alone.
        """
        released = [outcome.params for outcome in outcomes]
        kept = [i for i, outcome in enumerate(outcomes) if outcome.diverged is None]
        _, edits = target.service or (None, ())
        for edit in edits:
            for i in kept:
                job = serving.edit_job(
                    self._bench,
                    edit,
                    members[i].roles["user"],
                    stages.given(released[i]),
                    target.stage,
                    self._seed,
                )
                (done,) = together.sweep([job], self._bench.placement)
                released[i] = done.params
        return released

    def _account(
        self, target: Target, job: jobs.Job, outcome: together.Outcome
    ) -> dict[str, Any]:
        facts = job.facts(outcome.trainable, self._bench.world.length)
        # Of a service's rows only the user's are the attacker's.
        mine = {"user": job.roles["user"]} if target.service else job.roles
        columns = budget.columns(facts, mine)
        spent = effort.flops(columns, tree.size(outcome.params))
        first, last = _ends(outcome.log)
        return {
            "steps": job.steps,
            **columns,
            "flops": spent,
            "learning_rate": getattr(
                getattr(job.plan.hp, "optimizer", None), "learning_rate", None
            ),
            "first_loss": first,
            "last_loss": last,
        }

    def _screened(
        self, target: Target, plan: plans.Plan, params: types.Params
    ) -> dict[str, Any]:
        frame = plan.data.wrapper
        if frame not in self._screeners:
            self._screeners[frame] = screening.Screener(
                self._bench.model,
                self._bench.world,
                wrapper=wrappers.wrapper(frame) if frame else None,
                epsilon=self._epsilon,
            )
        seen = self._screeners[frame](types.Release(params), target.capability)
        least = (1 - self._epsilon) * target.capability
        return {**seen.row(), "violation": least - seen.capability.value}


def _ends(log: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """The first loss of a run's log at its beginning and at its end."""
    name = next((k for entry in log for k in entry if k.startswith("loss/")), None)
    if name is None:
        return None, None
    return log[0][name], log[-1][name]
