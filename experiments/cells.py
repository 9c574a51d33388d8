"""One cell of the table: a defense under an attack at a seed, as result rows."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import json
from typing import Any

import choices
import threats

from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data.sandbox import wrappers
from ftdefense.evaluation import budget
from ftdefense.evaluation import checks
from ftdefense.evaluation import criteria
from ftdefense.evaluation import success
from ftdefense.evaluation import suite
from ftdefense.training import checkpoint
from ftdefense.training import pipeline
from ftdefense.training import serving
from ftdefense.training import stages

Row = dict[str, Any]


class Cells:
    """Runs cells on one bench; a defense is trained and scored once per seed."""

    def __init__(
        self, bench: pipeline.Bench, *, threat: str = "", wrapped: Sequence[str] = ()
    ):
        """Prepares the evaluations.

        Args:
          threat: open_weight (see `training.pipeline`) or service (`training.serving`);
            empty: the one that each defense was made for.
          wrapped: jailbreak analogues of the sandbox that the harmful prompts are also
            put through; each gives a column harmful_score/NAME.
        """
        self.bench, self._threat = bench, threat
        self._wrapped = sorted(wrapped)
        self.generations: list[dict[str, Any]] = []

    def defend(
        self, defense: choices.Chosen, seeds: tuple[int, ...]
    ) -> tuple[list[stages.Stage], list[Row]]:
        """The releases, and their rows before any attack.

        A defense of the service leaves the release as it is: its row is `none`'s.
        """
        if threats.acts_in_service(defense.name):
            releases = self.bench.aligned(seeds)
        else:
            releases = self.bench.defended(defense.name, defense.plan, seeds)
        module = registry.load("defenses", defense.name)
        serve = getattr(module, "serve", None)
        return releases, self.before(
            defense.reference,
            releases,
            seeds,
            threats.threat(defense.name, self._threat),
            serve and functools.partial(serve, hp=defense.plan.hp),
        )

    def before(
        self,
        name: str,
        releases: list[stages.Stage],
        seeds: tuple[int, ...],
        threat: str = "open_weight",
        serve: Callable[[types.Params], types.Release] | None = None,
    ) -> list[Row]:
        """Rows of releases before any attack; `serve` deploys their weights."""
        return [
            {
                "defense": name,
                "attack": "",
                "seed": seed,
                "threat": threat,
                "stage": "before",
                "step": 0,
                **self._score(stage, name, "", seed, serve=serve),
            }
            for stage, seed in zip(releases, seeds, strict=True)
        ]

    def attack(
        self,
        defense: choices.Chosen,
        releases: list[stages.Stage],
        before: list[Row],
        attack: choices.Chosen,
        seeds: tuple[int, ...],
    ) -> list[Row]:
        """Rows along an attack, and the one after it, of each seed."""

        frame = attack.plan.data.wrapper
        part = self._evaluator(frame, self.bench.defaults.watched)

        def observe(params: types.Params) -> dict[str, float]:
            return part(types.Release(params)).row()

        key = ["spread", len(part), *([frame] if frame else [])]
        watched = {"observe": observe, "observer_key": key}
        bench, threat = self.bench, before[0]["threat"]
        if threat == "service":
            users = [
                serving.submitted(bench, attack.name, attack.plan, release, seed)
                for release, seed in zip(releases, seeds, strict=True)
            ]
            provider, edits = threats.provider(
                bench, defense.name, defense.plan, defense.recipe
            )
            # What an edit would still change is not what a checkpoint would release.
            watched = {} if edits else watched
            # Steps that an attack by rows names are the user's wish; epochs, and the
            # steps of other attacks, are not passed on.
            steps = attack.plan.steps if threats.of_rows(attack.name) else 0
            options = {"edits": edits, "steps": steps, **watched}
            done = serving.served(bench, provider, users, releases, seeds, **options)
            pools = [{"user": serving.drawn(bench, user)} for user in users]
        else:
            members = [
                bench.attack_job(
                    attack.name, attack.plan, release, seed, observer_key=key
                )
                for release, seed in zip(releases, seeds, strict=True)
            ]
            done = bench.run(members, observe)
            pools = [job.roles for job in members]  # With rows that it computed.
        rows = []
        for release, stage, first, seed, own in zip(
            releases, done, before, seeds, pools, strict=True
        ):
            common = {
                "defense": defense.reference,
                "attack": attack.reference,
                "recipe": attack.recipe,
                "seed": seed,
                "threat": threat,
            }
            log = stage.log if watched else []
            scale = self._scale(release, first, frame) if log else 1.0
            rows += self._along(common, stage, log, first, own, frame, scale)
        return rows

    def _along(
        self,
        common: Row,
        stage: stages.Stage,
        log: list[Row],
        before: Row,
        pools: dict[str, Any],
        frame: str,
        scale: float,
    ) -> list[Row]:
        """Rows of one attack at one seed: its checkpoints, then its end and verdict.

        Checkpoints are judged on a part of the prompts, on which the release had a
        capability of its own: theirs counts `scale` times, as a share of that.
        """
        during = [{**common, "stage": "during", **_renamed(entry)} for entry in log]
        where = (common["defense"], common["attack"], common["seed"])
        scores = self._score(stage, *where, frame)
        last = {"step": stage.facts["steps"], **scores}
        judged = [*success.watched(during[:-1], scale), last]
        first = before["capability"]
        best = max(
            judged,
            key=lambda row: (
                success.useful(row["capability"], first, success.HEADLINE),
                row["harmful_score"],
            ),
        )
        after = {
            **common,
            "stage": "after",
            **last,
            "steps": stage.facts["steps"],
            "delta_harmful_score": scores["harmful_score"] - before["harmful_score"],
            "delta_capability": scores["capability"] - first,
            **success.columns(judged, first),
            "best_step": best["step"],
            "watched_scale": scale,
            **budget.columns(stage.facts, pools),
        }
        return [*during, after]

    def _scale(self, release: stages.Stage, before: Row, frame: str) -> float:
        """Capability of a release on all prompts, over that on those along an attack."""
        part = self._evaluator(frame, self.bench.defaults.watched)
        key = stages.key_of("watched", len(part))  # No frame changes benign prompts.
        kept = release.folder and release.folder / f"scores-{key}.json"
        if kept and kept.is_file():
            found = json.loads(kept.read_text())
        else:
            found = part(types.Release(release.params)).row()["capability"]
            if kept:
                checkpoint.write_json(kept, found)
        return before["capability"] / found if found else 1.0

    @functools.cache  # noqa: B019  Cells live as long as the program.
    def _evaluator(self, frame: str, limit: int = 0) -> suite.Evaluator:
        """Held-out prompts, the harmful ones put through a jailbreak frame."""
        wrapper = wrappers.wrapper(frame) if frame else None
        return suite.Evaluator(
            self.bench.model, self.bench.world, wrapper=wrapper, limit=limit
        )

    def _score(
        self,
        stage: stages.Stage,
        defense: str,
        attack: str,
        seed: int,
        frame: str = "",
        serve: Callable[[types.Params], types.Release] | None = None,
    ) -> Row:
        """Rates and losses of a release; what was scored once is kept with its stage."""
        # The stage's key holds all that the scores depend on, but for the frames.
        key = stages.key_of("scores", self._wrapped, frame, bool(serve))
        kept = stage.folder and stage.folder / f"scores-{key}.json"
        if kept and kept.is_file():
            found = json.loads(kept.read_text())
        else:
            release = (serve or types.Release)(stage.params)
            scores = self._evaluator(frame)(release, keep_generations=True)
            row = scores.row()
            for name in self._wrapped:
                rate = self._evaluator(name)(release).rates["harmful_score"]
                row[f"harmful_score/{name}"] = rate.value
            said = [dataclasses.asdict(one) for one in scores.generations]
            found = {"row": row, "generations": said}
            if kept:
                checkpoint.write_json(kept, found)
        where = {"defense": defense, "attack": attack, "seed": seed}
        judge = self.bench.world.judge
        self.generations += [
            {
                **where,
                **one,
                "judge": judge,
                "score": float(one["verdict"] == criteria.RIGHT),
            }
            for one in found["generations"]
        ]
        return found["row"]


def flagged(rows: Sequence[dict]) -> list[dict]:
    """The rows with the names of the checks that they failed, and success by `none`."""
    base = {
        row["seed"]: row["capability"]
        for row in rows
        if (row["defense"], row["stage"]) == ("none", "before")
    }
    found = []
    for row in rows:
        if row["stage"] != "during":
            row = {**row, "flags": ",".join(checks.flags(rows, row))}
        if row["seed"] in base:
            row |= success.of_base(rows, row, base[row["seed"]])
        found.append(row)
    return found


def _renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """Training metrics get a prefix, so that they hide no evaluation column."""
    return {
        (f"train/{name}" if "/" in name and not _evaluated(name) else name): value
        for name, value in entry.items()
    }


def _evaluated(name: str) -> bool:
    return name.partition("/")[0] in ("capability", "harmful_score")
