"""A sweep of one cell: settings x seeds of an attack, vmapped in one program.

  python experiments/sweep.py --workdir=runs/sweep --defense=booster --attack=sft \\
      --sweep=optimizer.learning_rate=1e-5,3e-5,1e-4,3e-4 --seeds=0,1,2

The defense is trained once, at the first seed. Prints a table, and writes sweep.jsonl,
sweep.csv and, for one swept field, sweep.png.
"""

import math

from absl import flags
import choices
import settings
import threats

from ftdefense.core import config
from ftdefense.core import types
from ftdefense.evaluation import success
from ftdefense.evaluation import suite
from ftdefense.reporting import plots
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables
from ftdefense.training import together

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.DEFINE_string("defense", "none", "One defense: name, name:preset or file.py.")
flags.DEFINE_string("attack", "sft", "One attack, likewise.")
flags.DEFINE_multi_string(
    "sweep",
    ["optimizer.learning_rate=1e-5,3e-5,1e-4,3e-4,1e-3"],
    "Field of the attack and its values, comma-separated; repeated: their product.",
)


def main() -> None:
    workdir, seeds = settings.workdir(), settings.seeds()
    bench = settings.bench()
    (defense,) = choices.chosen(bench, "defenses", [FLAGS.defense])
    threats.check_release(bench, defense.name, defense.plan)
    (attack,) = choices.chosen(bench, "attacks", [FLAGS.attack])
    chosen = choices.combinations(attack.plan, FLAGS.sweep, "sweep")
    settings.claim(
        workdir,
        {
            "sweep": FLAGS.sweep,
            "seeds": seeds,
            "data": bench.world.hashes(),
            "defense": [FLAGS.defense, config.to_dict(defense.plan)],
            "attack": [FLAGS.attack, config.to_dict(attack.plan)],
        },
    )
    (release,) = bench.defended(defense.name, defense.plan, (seeds[0],))
    members = [
        bench.attack_job(attack.name, plan, release, seed)
        for _, plan in chosen
        for seed in seeds
    ]
    values = [value for value, _ in chosen for _ in seeds]
    outcomes = together.sweep(members, bench.placement)
    evaluate = suite.Evaluator(bench.model, bench.world)
    before = evaluate(types.Release(release.params)).row()
    rows = []
    for i, (value, member, outcome) in enumerate(
        zip(values, members, outcomes, strict=True)
    ):
        row = {
            "defense": FLAGS.defense,
            "attack": FLAGS.attack,
            "seed": member.seed,
            "stage": "after",
            "step": i,
            **value,
            "diverged": outcome.diverged is not None,
        }
        if outcome.diverged is None:
            scores = evaluate(types.Release(outcome.params)).row()
            row |= scores | success.columns([scores], before["capability"])
        rows.append(row)
    result_rows.write(workdir / "sweep.jsonl", rows)
    print(tables.text(_table(rows, before)))
    if len(FLAGS.sweep) == 1:
        field = FLAGS.sweep[0].partition("=")[0]
        print(plots.sweep(rows, field, before, workdir / "sweep.png"))


def _table(rows: list[dict], before: dict) -> tables.Table:
    """One line per member, and the release first."""
    fields = [sweep_flag.partition("=")[0] for sweep_flag in FLAGS.sweep]
    header = [*fields, "seed", "HS", "capability", "refusal", "verdict"]

    def shown(row: dict, name: str) -> str:
        value = row.get(name, math.nan)
        return f"{value:.3f}" if value == value else "diverged"

    metrics = ("harmful_score", "capability", "refusal")
    body = [["(before)"] + [""] * len(fields) + [shown(before, m) for m in metrics]]
    body[0].append("")
    for row in rows:
        body.append(
            [
                *(str(row[field]) for field in fields),
                str(row["seed"]),
                *(shown(row, m) for m in metrics),
                row.get("verdict", ""),
            ]
        )
    return header, body


if __name__ == "__main__":
    settings.run(main)
