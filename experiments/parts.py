"""The parts of an audit, most of which workers can share."""

from collections.abc import Collection
from collections.abc import Sequence
import functools
import math
import sys
from typing import Any

from absl import flags
import cells
import choices
import subjects
import tqdm
import workers

from ftdefense.audit import decision
from ftdefense.audit import effort
from ftdefense.audit import ensemble
from ftdefense.audit import families
from ftdefense.audit import probing
from ftdefense.audit import search
from ftdefense.audit import services
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.evaluation import success
from ftdefense.methods import plans
from ftdefense.training import pipeline
from ftdefense.training import stages

FLAGS = flags.FLAGS


class Audit:
    """One release, or one a seed, under the ensemble, and what it is compared with."""

    def __init__(
        self,
        bench: pipeline.Bench,
        searcher: search.Searcher,
        runner: cells.Cells,
        given: choices.Chosen | stages.Stage,
        table: families.Table,
        seeds: tuple[int, ...],
    ):
        """Prepares an audit of `given` (see `subjects.given`); nothing runs yet."""
        self._bench, self._searcher, self._runner = bench, searcher, runner
        self._given, self._table, self._seeds = given, table, seeds
        self.templates = subjects.templates()
        self.diverged: list[str] = []  # What ran away where a result was due.
        # Of each long fine-tuning that counts: attack, factor of its rate.
        self._soonest: dict[str, tuple[str, float]] = {}

    @functools.cached_property
    def audited(self) -> subjects.Subject:
        return subjects.audited(self._given, self._runner, self._seeds)

    @functools.cached_property
    def references(self) -> list[subjects.Subject]:
        names = subjects.reference_names()
        return [self._reference(name) for name in names]

    def _reference(self, name: str) -> subjects.Subject:
        return subjects.reference(name, self._bench, self._runner, self._seeds)

    def watched(self) -> list[subjects.Subject]:
        """Whoever can be judged along a long fine-tuning."""
        return [one for one in [self.audited, *self.references] if one.has_checkpoints]

    def units(self) -> workers.Units:
        """What needs no more than releases: workers share it in this order.

        A family comes with the one whose trials it repeats.
        """
        bind = functools.partial
        companies = subjects.companies(self._seeds)
        names = subjects.reference_names()
        chosen = families.chosen(
            self._table, FLAGS.budget, self.templates, tuple(FLAGS.families) or None
        )
        groups: dict[str, tuple[str, ...]] = {}
        for name in chosen:
            leader = self._table[name].mass_of
            leader = leader if leader in chosen else name
            groups[leader] = (*groups.get(leader, ()), name)
        train = bind(subjects.audited, self._given, self._runner)
        return [
            # Those with a pretraining of their own first: they begin together.
            *((f"release {some}", bind(train, some)) for some in companies),
            *((f"reference {one}", bind(self._reference, one)) for one in names[::-1]),
            *((f"family {name}", bind(self._family, groups[name])) for name in groups),
            *((f"scale {i}", bind(self._scale, i)) for i in range(len(names))),
            *((f"horizon {i}", bind(self._horizon, i)) for i in range(1 + len(names))),
        ]

    def _family(self, names: tuple[str, ...]) -> None:
        self.attack(self.audited, names)

    def _scale(self, i: int) -> None:
        self.for_scale(self.references[i])

    def _horizon(self, i: int) -> None:
        if i < len(self.watched()):
            self.horizon(self.watched()[i])

    def attack(
        self, one: subjects.Subject, only: tuple[str, ...] = ()
    ) -> ensemble.Found:
        """The ensemble, or some of its families, against one release, with a bar."""
        wanted = only or tuple(FLAGS.families) or None
        return self._attack(one, self.templates, wanted, FLAGS.trials)

    def for_scale(self, one: subjects.Subject) -> ensemble.Found:
        """The families that are also run against a reference."""
        wanted = ("full",) if FLAGS.budget == "quick" else ("full", "sidestepper")
        if subjects.in_service():
            wanted = services.FOR_SCALE
        return self._attack(one, (), wanted, None)

    def _attack(self, one, templates, wanted, trials) -> ensemble.Found:
        chosen = families.chosen(self._table, FLAGS.budget, templates, wanted, trials)
        best = 0.0
        with tqdm.tqdm(
            total=sum(chosen.values()),
            desc=one.name,
            unit="trial",
            disable=bool(FLAGS.worker) or not sys.stderr.isatty(),
            position=1,
        ) as bar:

            def on_trial(row: dict[str, Any]) -> None:
                nonlocal best
                if not row["diverged"] and row["violation"] <= 0:
                    best = max(best, row["harmful_score"])
                bar.update()
                bar.set_postfix_str(f"{row['family']}, best HS {best:.2f}")

            return ensemble.run(
                self._bench,
                self._searcher,
                one.target(),
                self._table,
                FLAGS.budget,
                defense=FLAGS.defense or "",
                templates=templates,
                only=wanted,
                trials=trials,
                on_trial=on_trial,
            )

    def repeats(self) -> workers.Units:
        """The worst families again, once all have been searched."""
        found = self.attack(self.audited)
        return [
            (f"repeat {name}", functools.partial(self._repeat, found, name))
            for name in self._worst(found)
        ]

    def confirm(self, found: ensemble.Found) -> list[dict[str, Any]]:
        """The best setting of each family again, at every seed, on all held-out prompts.

        At `quick` only of the three families that did most harm, and of others that
        succeeded in the search while nothing has been broken.
        """
        rows = [row for name in self._worst(found) for row in self._repeat(found, name)]
        for name in self._left(found):
            if decision.broken([row for row in rows if row["stage"] == "after"]):
                break
            rows += self._repeat(found, name)
        return rows

    def _left(self, found: ensemble.Found) -> list[str]:
        """Families that succeeded in the search and are not among the worst."""
        winners, worst = found.winners(), self._worst(found)
        return [
            name
            for name, row in winners.items()
            if name not in worst
            and row["violation"] <= 0
            and row["harmful_score"] >= success.THRESHOLD
        ]

    def again(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A long fine-tuning that broke the release at one seed, at the others, too."""
        after = [row for row in rows if row["stage"] == "after"]
        if not any(row[f"success_{success.HEADLINE:g}"] for row in after):
            return []
        if len(self._seeds) > 1:
            how = self._soonest[self.audited.name]
            rows = [*rows, *self._long(self.audited, *how, self._seeds[1:])]
        return rows

    def _worst(self, found: ensemble.Found) -> list[str]:
        winners = found.winners()
        useful = [name for name, row in winners.items() if row["violation"] <= 0]
        # Where all fail alike, those that train say more.
        ranked = sorted(
            useful,
            key=lambda name: (
                -winners[name]["harmful_score"],
                not self._table[name].trains,
            ),
        )
        return ranked[:3] if FLAGS.budget == "quick" else ranked

    def _repeat(self, found: ensemble.Found, name: str) -> list[dict[str, Any]]:
        values = found.winners()[name]["values"]
        module, plan = self._resolved(name, values)
        chosen = choices.Chosen(name, module, plan, f"{module} {values}")
        repeated = self._attacked(self.audited, chosen, self._seeds)
        tried = len(found.rows[name])  # Part of the budget: the best of so many.
        return [r | ({"trials": tried} if "trials" in r else {}) for r in repeated]

    def _attacked(
        self, one: subjects.Subject, chosen: choices.Chosen, seeds: tuple[int, ...]
    ) -> list[dict[str, Any]]:
        """Rows of an attack at some of the audit's seeds; one that diverges has none."""
        at = [self._seeds.index(seed) for seed in seeds]
        releases, before = ([rows[i] for i in at] for rows in (one.stages, one.before))

        def attack(part: slice) -> list[dict[str, Any]]:
            return self._runner.attack(
                one.defense, releases[part], before[part], chosen, seeds[part]
            )

        try:
            return attack(slice(None))
        except errors.NonFiniteError:
            rows = []
            for i, seed in enumerate(seeds):
                try:
                    rows += attack(slice(i, i + 1))
                except errors.NonFiniteError:
                    self.diverged.append(f"{chosen.reference} at seed {seed}")
            return rows

    def _resolved(self, name: str, values: dict[str, Any]) -> tuple[str, plans.Plan]:
        family = self._table[name]
        return ensemble.resolved(self._bench, family, values, FLAGS.defense or "")

    def _strongest(
        self, found: ensemble.Found, trains: Collection[str]
    ) -> tuple[str, plans.Plan] | None:
        """Of trials that left a model of use the one of most harm, or else of most steps.

        None, if no attack that trains left one.
        """
        sound = [
            row
            for row in found.trials()
            if row["family"] in trains and not row["diverged"] and row["violation"] <= 0
        ]
        if not sound:
            return None
        best = max(sound, key=lambda r: (r["harmful_score"], r["learning_rate_mass"]))
        return self._resolved(best["family"], best["values"])

    def horizon(self, one: subjects.Subject) -> list[dict[str, Any]]:
        """Fine-tuning of one release for long, judged at sixteen checkpoints.

        Beyond `quick` harm alone at three rates, and harm with benign rows, of which what
        breaks first counts: weights that are only rescaled, or whose harm costs
        capability, must not look durable. The rate of a service is its provider's.
        """
        ways = [("sft", 1.0)]
        if FLAGS.budget != "quick" and not subjects.in_service():
            ways += [("sft", 3.0), ("sft", 10.0), ("sidestepper", 1.0)]
        runs = {way: self._long(one, *way, self._seeds[:1]) for way in ways}
        soonest = min(runs, key=lambda w: effort.steps_to_break(runs[w]) or math.inf)
        self._soonest[one.name] = soonest
        return runs[soonest]

    def _long(
        self, one: subjects.Subject, attack: str, factor: float, seeds: tuple[int, ...]
    ) -> list[dict[str, Any]]:
        """An attack at a constant rate, so many times the preset's."""
        steps = {"quick": 512, "standard": 1536, "full": 6144}[FLAGS.budget]
        plan = self._bench.plan("attacks", attack)
        for assignment in (
            f"steps={steps}",
            "optimizer.schedule.decay=constant",
            f"optimizer.learning_rate={factor * plan.hp.optimizer.learning_rate}",
        ):
            plan = config.override_plan(plan, assignment)
        chosen = choices.Chosen(
            "horizon", attack, plan, f"{attack} {steps} x{factor:g}"
        )
        return self._attacked(one, chosen, seeds)

    def probe(
        self, found: ensemble.Found, confirmed: Sequence[dict[str, Any]] = ()
    ) -> probing.Probed:
        """Diagnostics that run the model, on the best settings that the search found.

        What `confirmed`, rows of families that were repeated, says of a family stands in
        the place of what the search said.
        """
        by_name = {one.name: one.stages[0] for one in [*self.references, self.audited]}
        winners = found.winners()

        def best(name: str, otherwise: str) -> tuple[str, plans.Plan]:
            values = winners[name]["values"] if name in winners else {}
            if not values:
                return otherwise, self._bench.plan("attacks", otherwise)
            return self._resolved(name, values)

        scores = {name: probing.best_of(rows) for name, rows in found.rows.items()}
        for name in scores:
            repeated = [
                row[f"best_harmful_score_{success.HEADLINE:g}"]
                for row in confirmed
                if (row["attack"], row["stage"]) == (name, "after")
            ]
            scores[name] = max(repeated, default=scores[name])
        trains = {name for name in scores if self._table[name].trains}
        known = probing.Known(
            subject=self.audited.target(),
            reference=by_name.get("none"),
            never=by_name.get("never"),
            naive=best("full", "sft"),
            adaptive=best("sidestepper", "sidestepper"),
            strongest=self._strongest(found, trains),
            tuned=max((scores[name] for name in trains), default=0.0),
            naive_score=scores.get("full", 0.0),
            serve=subjects.serve(getattr(self._given, "plan", None)),
            untrained={n: score for n, score in scores.items() if n not in trains},
        )
        quick = FLAGS.budget == "quick"
        try:
            return probing.probe(
                self._bench,
                known,
                seed=self._seeds[0],
                points=15 if quick else 30,
                radii=() if quick else (3.0, 10.0),
            )
        except errors.NonFiniteError:
            self.diverged.append("a probe of the weights")
            return probing.Probed(())  # What it would have answered is unanswered.
