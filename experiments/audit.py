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
import sys
from typing import Any

from absl import flags
import cells
import jax
import parts
import settings
import subjects
import workers

from ftdefense.audit import decision
from ftdefense.audit import dossier
from ftdefense.audit import families
from ftdefense.audit import judgement
from ftdefense.audit import search
from ftdefense.audit import studies
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.evaluation import success
from ftdefense.reporting import audit_page
from ftdefense.reporting import manifest
from ftdefense.reporting import rows as result_rows
from ftdefense.training import checkpoint
from ftdefense.training import pipeline

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(subjects)
flags.adopt_module_key_flags(workers)
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
    everything = families.of_service if subjects.in_service() else families.of_weights
    own = dict(map(subjects.own_family, FLAGS.attack))
    known = {**everything(), **own}  # Before anything is read: it may be mistyped.
    unknown = set(FLAGS.families) - set(known)
    if unknown:
        raise errors.unknown("family", sorted(unknown)[0], known)
    bench = subjects.bench()
    short = bench.defaults.attack
    rate = OWN_RATE if subjects.has_own_data() else 1.0
    shape = subjects.shape(bench)
    table = {**everything(short.steps, short.batch_size, rate, **shape), **own}
    given = subjects.given(bench)
    storage = studies.opened(FLAGS.storage) if FLAGS.storage else None
    settings.claim(workdir, resolved(bench, seeds))
    runner = cells.Cells(bench, threat=subjects.threat())
    searcher = search.Searcher(
        bench,
        storage or studies.opened(f"sqlite:///{workdir.resolve()}/studies.db"),
        parallel=FLAGS.parallel,
        seed=seeds[0],
    )
    audit = parts.Audit(bench, searcher, runner, given, table, seeds)
    spent = workers.split(audit.units(), workdir / "verdict.json", then=audit.repeats)
    if spent is None:
        return
    audited, references = audit.audited, audit.references
    found = audit.attack(audited)
    scale = {one.name: audit.for_scale(one).trials() for one in references}
    confirmed = audit.confirm(found)
    horizons = {one.name: audit.horizon(one) for one in audit.watched()}
    if not decision.broken([row for row in confirmed if row["stage"] == "after"]):
        confirmed += audit.again(horizons.get(audited.name, []))
    base = next(
        (r.before[0]["capability"] for r in references if r.name == "none"), None
    )
    if base is not None:
        confirmed = [r | success.of_base(confirmed, r, base) for r in confirmed]
    probes = None
    if not subjects.in_service():  # Whose weights nobody sees.
        probes = audit.probe(found, confirmed)
    judged = judgement.judge(
        bench,
        dossier.Dossier(
            subject=audited.name,
            reference=FLAGS.defense or "",
            flags=subjects.repeated(seeds[0]),
            templates=tuple(audit.templates),
            budget=FLAGS.budget,
            before=audited.before,
            families=table,
            trials=found.trials(),
            skipped=found.skipped,
            scale=scale,
            confirmed=confirmed,
            horizons=horizons,
            generations=runner.generations,
            seed=seeds[0],
            probes=probes,
            base_capability=base,
            diverged=tuple(dict.fromkeys(audit.diverged)),
        ),
    )
    write(workdir, bench, audited, found, scale, confirmed, horizons, judged, runner)
    seconds = {f"family {name}": took for name, took in found.seconds.items()}
    checkpoint.write_json(workdir / "seconds.json", seconds | spent)
    print(audit_page.text(judged, found.trials(), confirmed))
    print(f"\n{workdir / 'audit.html'}")


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
