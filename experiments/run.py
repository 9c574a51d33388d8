"""Defend, attack, judge, report: one or several cells of defense x attack x seed.

  python experiments/run.py --workdir=runs/first

trains `none`, `vaccine`, `booster` and `ctrap` on the sandbox, attacks each with `sft`,
`sidestepper` and `kick_settle`, prints a table and writes report.html beside it.
Repeating the command resumes what was interrupted and reads what is finished.
"""

import functools
import json
import sys

from absl import flags
import cells
import choices
import jax
import report
import settings
import threats
import tqdm
import workers

from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.data import recipes
from ftdefense.data.sandbox import wrappers
from ftdefense.evaluation import checks
from ftdefense.reporting import events
from ftdefense.reporting import manifest
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables
from ftdefense.training import checkpoint

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(workers)
flags.DEFINE_list(
    "defense",
    ["none", "vaccine", "booster", "ctrap"],
    "Defenses: a name, name:preset or file.py, comma-separated; or all.",
)
flags.DEFINE_list(
    "attack",
    ["sft", "sidestepper", "kick_settle"],
    "Attacks, likewise; sft:NAME is the naive recipe published with defense NAME, and "
    "naive stands for that of each defense.",
)
flags.DEFINE_enum(
    "threat",
    "",
    ["", "open_weight", "service"],
    "open_weight: the attacker trains the release. service: the provider trains it on "
    "the attacker's rows; of an attack only its data counts. Empty: the one that each "
    "defense was made for.",
)
flags.DEFINE_list(
    "wrappers",
    [],
    "Jailbreak analogues that harmful prompts are also put through: prefill:K and "
    "template:plain, :instruction, :chat (in place of the model's own) on any data; "
    "trigger, persona, competing, style, paraphrase in the sandbox. Each adds a column "
    "harmful_score/NAME.",
)


def main() -> None:
    workdir = settings.workdir()
    seeds = settings.seeds()
    choices.references("defenses", FLAGS.defense)  # Names are checked before weights
    choices.references("attacks", FLAGS.attack)  # and data are read.
    bench = settings.bench()
    chosen = choices.chosen(bench, "defenses", fitting(FLAGS.defense))
    pairs = choices.per_defense(bench, chosen, FLAGS.attack)
    for defense, attacks in pairs:
        threat = threats.threat(defense.name, FLAGS.threat)
        bench.check(defense.name, defense.plan)
        for attack in attacks:
            if threat == "service":
                threats.check(attack.name)
            recipes.attacker_pools(bench.world, attack.plan.data)  # Are there so many?
    for name in FLAGS.wrappers:
        wrappers.wrapper(name)  # Is there such a one?
    anywhere = ("prefill", "template")
    sandbox_only = [w for w in FLAGS.wrappers if not w.startswith(anywhere)]
    if sandbox_only and FLAGS.model is not None:
        raise errors.UserError(
            f"--wrappers={sandbox_only[0]} is made of the sandbox's words; with --model "
            "only prefill:K and template:NAME work."
        )
    runner = cells.Cells(bench, threat=FLAGS.threat, wrapped=FLAGS.wrappers)
    hashes = bench.world.hashes()
    settings.claim(
        workdir,
        {
            "model": config.to_dict(bench.model.config),
            "weights": FLAGS.model,
            "data": hashes,
            "threat": FLAGS.threat,
            "wrappers": FLAGS.wrappers,
            "seeds": seeds,
            "vmap_seeds": FLAGS.vmap_seeds,
            "defenses": {c.reference: config.to_dict(c.plan) for c in chosen},
            "attacks": {
                (a.reference if a.reference == a.recipe else f"{d.name} {a.recipe}"): (
                    config.to_dict(a.plan)
                )
                for d, attacks in pairs
                for a in attacks
            },
        },
    )
    companies = [tuple(seeds)] if FLAGS.vmap_seeds else [(seed,) for seed in seeds]
    units = [
        (
            f"{pair[0].reference} {company}",
            functools.partial(run, runner, [pair], [company]),
        )
        for company in companies
        for pair in pairs
    ]
    if workers.split(units, workdir / "results.jsonl", bench.start) is None:
        return
    rows = run(runner, pairs, companies)
    write(workdir, rows, runner.generations)
    checkpoint.write_json(
        workdir / "manifest.json",
        manifest.build(
            sys.argv,
            [str(device) for device in jax.devices()],
            hashes,
            f"{bench.world.name}, {FLAGS.threat or 'each its own threat'}, "
            f"seeds {','.join(map(str, seeds))}",
        ),
    )
    print(tables.text(tables.final(rows)))
    raised = sorted({flag for row in rows for flag in tables.flags(row)})
    for flag in raised:
        print(f"  {flag}: {checks.REASONS[flag]}")
    print(f"\n{report.write(workdir)}")


def fitting(asked: list[str]) -> list[str]:
    """`all` stands for every defense that the threat model has a place for."""
    if list(asked) != ["all"]:
        return asked
    names = choices.references("defenses", ["all"])
    return [name for name in names if threats.fits(name, FLAGS.threat)]


def run(
    runner: cells.Cells,
    pairs: list[tuple[choices.Chosen, list[choices.Chosen]]],
    companies: list[tuple[int, ...]],
) -> list[dict]:
    """Rows of every cell, with their flags.

    `companies` are the seeds that run together: one by one, all of a seed comes before
    the next; with --vmap_seeds there is one company of all.
    """
    rows: list[dict] = []
    total = sum(1 + len(attacks) for _, attacks in pairs)
    with tqdm.tqdm(
        total=total * len(companies),
        desc="stages",
        disable=bool(FLAGS.worker) or not sys.stderr.isatty(),
        position=1,
    ) as bar:
        for company in companies:
            for defense, attacks in pairs:
                releases, before = runner.defend(defense, company)
                rows += before
                bar.update()
                for attack in attacks:
                    rows += runner.attack(defense, releases, before, attack, company)
                    bar.update()
    return cells.flagged(rows)


def write(workdir, rows: list[dict], generations: list[dict]) -> None:
    """results.jsonl and .csv, generations.jsonl, TensorBoard files if asked for."""
    result_rows.write(workdir / "results.jsonl", rows)
    lines = (json.dumps(generation, sort_keys=True) for generation in generations)
    result_rows.write_text(workdir / "generations.jsonl", "\n".join(lines) + "\n")
    if FLAGS.tensorboard:
        for defense, attack, seed in {
            (r["defense"], r["attack"], r["seed"]) for r in rows if r["attack"]
        }:
            along = [
                row
                for row in rows
                if (row["defense"], row["attack"], row["seed"])
                == (defense, attack, seed)
                and row["stage"] == "during"
            ]
            name = f"{defense}-{attack}-s{seed}".replace(":", "_")
            events.write(workdir / "tensorboard" / name, along)


if __name__ == "__main__":
    settings.run(main)
