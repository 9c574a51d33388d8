"""Audits one defense, or any released weights: an ensemble of attacks, and a verdict.

  python experiments/audit.py --workdir=runs/audit --defense=booster
  python experiments/audit.py --workdir=runs/mine --checkpoint=FOLDER \\
      --harmful=harmful.jsonl --benign=benign.jsonl --reference=UNDEFENDED

searches every attack family for the settings that do most harm to a model that stays
useful, repeats the worst at several seeds, asks whether the evaluation can be believed,
and writes audit.html. Repeating the command resumes what was interrupted. A defense that
acts while a provider fine-tunes is attacked by what its user submits.
"""

import json
import math
import sys
from typing import Any

from absl import flags
import cells
import choices
import jax
import settings
import subjects
import tqdm

from ftdefense.audit import dossier
from ftdefense.audit import effort
from ftdefense.audit import ensemble
from ftdefense.audit import families
from ftdefense.audit import judgement
from ftdefense.audit import probing
from ftdefense.audit import search
from ftdefense.audit import services
from ftdefense.audit import studies
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.evaluation import success
from ftdefense.methods import plans
from ftdefense.reporting import audit_page
from ftdefense.reporting import manifest
from ftdefense.reporting import rows as result_rows
from ftdefense.training import checkpoint
from ftdefense.training import pipeline

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(subjects)
FLAGS.set_default("seeds", ["0", "1", "2"])
flags.DEFINE_enum(
    "budget", "quick", families.BUDGETS, "quick: minutes; standard: an hour; full."
)
flags.DEFINE_list("families", [], "Only these attack families; empty: all.")
flags.DEFINE_integer(
    "trials",
    None,
    "Of every family, instead of the budget's: --families=full --trials=40 is a plain "
    "sweep of fine-tuning.",
    lower_bound=1,
)
flags.DEFINE_list(
    "attack", [], "Attacks of your own to add: name, name:preset or file.py."
)
flags.DEFINE_string(
    "storage", None, "URL of the Optuna studies, shared by workers; default: SQLite."
)
flags.DEFINE_integer(
    "parallel", 4, "Trials that one compiled program trains.", lower_bound=1
)

OWN_RATE = 0.1  # Of the sandbox's learning rates, for a user's larger model; DESIGN.


def main() -> None:
    workdir, seeds = settings.workdir(), tuple(settings.seeds())
    subjects.check()
    if subjects.in_service():
        families.FAMILIES.clear()
        families.FAMILIES.update(services.FAMILIES)
    own = dict(map(subjects.own_family, FLAGS.attack))
    unknown = set(FLAGS.families) - {*families.FAMILIES, *own}
    if unknown:
        raise errors.unknown("family", sorted(unknown)[0], {**families.FAMILIES, **own})
    bench = subjects.bench()
    short = bench.defaults.attack
    rate = OWN_RATE if subjects.has_own_data() else 1.0
    families.FAMILIES.update(
        families.at_scale(short.steps, short.batch_size, rate, **subjects.shape(bench))
    )
    families.FAMILIES.update(own)
    given = subjects.given(bench)
    storage = studies.opened(FLAGS.storage) if FLAGS.storage else None
    settings.claim(workdir, resolved(bench, seeds))
    runner = cells.Cells(bench, threat=subjects.threat())
    audited = subjects.audited(given, runner, seeds)
    references = subjects.references(bench, runner, seeds)
    templates = subjects.templates()
    searcher = search.Searcher(
        bench,
        storage or f"sqlite:///{workdir.resolve()}/studies.db",
        parallel=FLAGS.parallel,
        seed=seeds[0],
    )
    found = attack(bench, searcher, audited, templates)
    scale = {
        one.name: attack(
            bench,
            searcher,
            one,
            (),
            for_scale(),
        ).trials()
        for one in references
    }
    confirmed = confirm(bench, runner, audited, found, seeds)
    for one in references:
        if one.name == "none":
            base = one.before[0]["capability"]
            confirmed = [r | success.of_base(confirmed, r, base) for r in confirmed]
    horizons = {
        one.name: horizon(bench, runner, one, seeds[0])
        for one in [audited, *references]
        if one.has_checkpoints
    }
    probes = None
    if not subjects.in_service():  # Whose weights nobody sees.
        probes = probe(bench, searcher, audited, references, found, seeds[0])
    judged = judgement.judge(
        bench,
        dossier.Dossier(
            subject=audited.name,
            reference=FLAGS.defense or "",
            templates=tuple(templates),
            budget=FLAGS.budget,
            before=audited.before,
            trials=found.trials(),
            skipped=found.skipped,
            scale=scale,
            confirmed=confirmed,
            horizons=horizons,
            generations=runner.generations,
            seed=seeds[0],
            probes=probes,
        ),
    )
    write(workdir, bench, audited, found, scale, confirmed, horizons, judged, runner)
    print(audit_page.text(judged, found.trials(), confirmed))
    print(f"\n{workdir / 'audit.html'}")


def for_scale() -> tuple[str, ...]:
    """Families that are also run against the references."""
    if subjects.in_service():
        return services.FOR_SCALE
    return ("full",) if FLAGS.budget == "quick" else ("full", "sidestepper")


def resolved(bench: pipeline.Bench, seeds: tuple[int, ...]) -> dict[str, Any]:
    """What the work directory's config.json holds."""
    asked = ("defense", "checkpoint", "reference", "template", "families")
    asked += ("trials", "attack", "set")
    return {
        "audit": {name: FLAGS[name].value for name in asked},
        "budget": FLAGS.budget,
        "seeds": list(seeds),
        "model": config.to_dict(bench.model.config),
        "data": bench.world.hashes(),
    }


def attack(
    bench: pipeline.Bench,
    searcher: search.Searcher,
    one: subjects.Subject,
    templates: list[str] | tuple[str, ...],
    only: tuple[str, ...] | None = None,
) -> ensemble.Found:
    """The ensemble against one release, with a bar."""
    wanted = only or tuple(FLAGS.families) or None
    trials = None if only else FLAGS.trials
    total = sum(families.chosen(FLAGS.budget, templates, wanted, trials).values())
    best = 0.0
    with tqdm.tqdm(
        total=total,
        desc=one.name,
        unit="trial",
        disable=not sys.stderr.isatty(),
        position=1,
    ) as bar:

        def on_trial(row: dict[str, Any]) -> None:
            nonlocal best
            if not row["diverged"] and row["violation"] <= 0:
                best = max(best, row["harmful_score"])
            bar.update()
            bar.set_postfix_str(f"{row['family']}, best HS {best:.2f}")

        return ensemble.run(
            bench,
            searcher,
            one.target(),
            FLAGS.budget,
            defense=FLAGS.defense or "",
            templates=templates,
            only=wanted,
            trials=trials,
            on_trial=on_trial,
        )


def confirm(
    bench: pipeline.Bench,
    runner: cells.Cells,
    audited: subjects.Subject,
    found: ensemble.Found,
    seeds: tuple[int, ...],
) -> list[dict[str, Any]]:
    """The best setting of each family again, at every seed, on all held-out prompts.

    At `quick` only of the three families that did most harm.
    """
    winners = found.winners()
    useful = [name for name, row in winners.items() if row["violation"] <= 0]
    # Where all fail alike, those that train say more.
    ranked = sorted(
        useful,
        key=lambda name: (
            -winners[name]["harmful_score"],
            not families.FAMILIES[name].trains,
        ),
    )
    if FLAGS.budget == "quick":
        ranked = ranked[:3]
    rows = []
    for name in ranked:
        module, plan = ensemble.resolved(
            bench, name, winners[name]["values"], FLAGS.defense or ""
        )
        repeated = runner.attack(
            audited.defense,
            audited.stages,
            audited.before,
            choices.Chosen(name, module, plan, f"{module} {winners[name]['values']}"),
            seeds,
        )
        tried = len(found.rows[name])  # Part of the budget: the best of so many.
        rows += [r | ({"trials": tried} if "trials" in r else {}) for r in repeated]
    return rows


def horizon(
    bench: pipeline.Bench, runner: cells.Cells, one: subjects.Subject, seed: int
) -> list[dict[str, Any]]:
    """Plain fine-tuning of one release for long, judged at sixteen checkpoints.

    Beyond `quick` at three rates, of which the one that breaks first counts: weights
    that are only rescaled must not look durable. The rate of a service is its provider's.
    """
    quick = FLAGS.budget == "quick"
    steps = {"quick": 512, "standard": 1536, "full": 6144}[FLAGS.budget]
    base = bench.plan("attacks", "sft")
    runs = []
    for factor in (1.0,) if quick or subjects.in_service() else (1.0, 3.0, 10.0):
        plan = base
        for assignment in (
            f"steps={steps}",
            "optimizer.schedule.decay=constant",
            f"optimizer.learning_rate={factor * base.hp.optimizer.learning_rate}",
        ):
            plan = config.override_plan(plan, assignment)
        runs.append(
            runner.attack(
                one.defense,
                one.stages[:1],
                one.before[:1],
                choices.Chosen("horizon", "sft", plan, f"sft {steps} x{factor:g}"),
                (seed,),
            )
        )
    return min(runs, key=lambda rows: effort.steps_to_break(rows) or math.inf)


def probe(
    bench: pipeline.Bench,
    searcher: search.Searcher,
    audited: subjects.Subject,
    references: list[subjects.Subject],
    found: ensemble.Found,
    seed: int,
) -> probing.Probed:
    """Diagnostics that run the model, on the best settings that the search found."""
    by_name = {one.name: one.stages[0] for one in [*references, audited]}
    winners = found.winners()

    def best(name: str, otherwise: str) -> tuple[str, plans.Plan]:
        values = winners[name]["values"] if name in winners else {}
        if not values:
            return otherwise, bench.plan("attacks", otherwise)
        return ensemble.resolved(bench, name, values, FLAGS.defense or "")

    trained = [row for row in found.trials() if families.FAMILIES[row["family"]].trains]
    return probing.probe(
        bench,
        searcher,
        probing.Known(
            subject=audited.target(),
            reference=by_name.get("none"),
            never=by_name.get("never"),
            naive=best("full", "sft"),
            adaptive=best("sidestepper", "sidestepper"),
            tuned=probing.best_of(trained),
            naive_score=probing.best_of(found.rows.get("full", [])),
            serve=subjects.serve(),
            untrained={
                name: probing.best_of(rows)
                for name, rows in found.rows.items()
                if not families.FAMILIES[name].trains
            },
        ),
        seed=seed,
        points=15 if FLAGS.budget == "quick" else 30,
        radii=() if FLAGS.budget == "quick" else (3.0, 10.0),
    )


def write(
    workdir, bench, audited, found, scale, confirmed, horizons, judged, runner
) -> None:
    """Rows, generations, verdict and the page."""
    trials = [*found.trials(), *(row for rows in scale.values() for row in rows)]
    result_rows.write(workdir / "trials.jsonl", trials)
    result_rows.write(workdir / "results.jsonl", [*audited.before, *confirmed])
    lines = (json.dumps(one, sort_keys=True) for one in runner.generations)
    result_rows.write_text(workdir / "generations.jsonl", "\n".join(lines) + "\n")
    checkpoint.write_json(workdir / "verdict.json", judged)
    checkpoint.write_json(workdir / "seconds.json", found.seconds)
    made = manifest.build(
        sys.argv,
        [str(device) for device in jax.devices()],
        bench.world.hashes(),
        f"{judged['subject']}, {FLAGS.budget} budget, {bench.world.name}",
    )
    checkpoint.write_json(workdir / "manifest.json", made)
    images = audit_page.plots(workdir, judged, found.trials(), horizons)
    html = audit_page.render(judged, found.trials(), confirmed, images, made)
    result_rows.write_text(workdir / "audit.html", html)


if __name__ == "__main__":
    settings.run(main)
