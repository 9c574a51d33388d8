"""Objective or budget? Every control arm against each defense, and the main effects.

  python experiments/arms.py --workdir=runs/arms --defense=none,booster,ctrap,sdd

runs {harmful, both, benign} x {own, SideStepper's budget} x {constant, cosine, kick} x
{LoRA scale 0.125, 2} against each release, all arms of a budget in one program, prints
what each factor changes of harm, capability and success (both at once) when the others
are averaged over, and writes arms.jsonl.
"""

from absl import flags
import choices
import settings
import threats

from ftdefense.audit import arms
from ftdefense.core import types
from ftdefense.evaluation import success
from ftdefense.evaluation import suite
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables
from ftdefense.training import pipeline
from ftdefense.training import together

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.DEFINE_list("defense", ["none"], "Defenses, likewise to run.py.")
flags.DEFINE_float("learning_rate", 1e-3, "Peak of every arm.")

SCORES = {
    "the harmful score": "harmful_score",
    "capability": "capability",
    "success (harm, and 90 % of the capability kept)": "success",
}


def against(
    bench: pipeline.Bench,
    evaluate: suite.Evaluator,
    defense: choices.Chosen,
    seed: int,
) -> list[dict]:
    """A row for every arm against one release."""
    (release,) = bench.defended(defense.name, defense.plan, (seed,))
    reference = evaluate(types.Release(release.params)).row()["capability"]
    named = arms.arms(FLAGS.learning_rate)
    outcomes = together.sweep(
        [bench.attack_job("sidestepper", plan, release, seed) for _, plan in named],
        bench.placement,
    )
    rows = []
    for i, ((levels, _), outcome) in enumerate(zip(named, outcomes, strict=True)):
        row = {
            "defense": defense.reference,
            "seed": seed,
            "step": i,
            **levels,
            "diverged": outcome.diverged is not None,
            "success": False,
        }
        if outcome.diverged is None:
            scores = evaluate(types.Release(outcome.params)).row()
            broken = success.columns([scores], reference)["verdict"] == success.BROKEN
            row |= {**scores, "success": broken}
        rows.append(row)
    return rows


def main() -> None:
    workdir, seeds = settings.workdir(), settings.seeds()
    bench = settings.bench()
    defenses = choices.chosen(bench, "defenses", FLAGS.defense)
    for defense in defenses:
        threats.check_release(bench, defense.name, defense.plan)
    settings.claim(
        workdir, {"data": bench.world.hashes(), "learning_rate": FLAGS.learning_rate}
    )
    path = workdir / "arms.jsonl"
    rows = result_rows.read(path) if path.is_file() else []
    evaluate = suite.Evaluator(bench.model, bench.world)
    for seed in seeds:
        for defense in defenses:
            key = (defense.reference, seed)
            if not any((row["defense"], row["seed"]) == key for row in rows):
                rows += against(bench, evaluate, defense, seed)
                result_rows.write(path, rows)
    wanted = {defense.reference for defense in defenses}
    shown = [r for r in rows if r["defense"] in wanted and r["seed"] in seeds]
    text = report(shown)
    result_rows.write_text(workdir / "arms.txt", text + "\n")
    print(text)


def report(rows: list[dict]) -> str:
    """Main effects over all defenses, and what each change buys against each."""
    header = ["factor", "level", "HS", "capability", "success", "arms"]
    body = [
        [e.factor, e.level, f"{e.harmful_score:.3f}", f"{e.capability:.3f}"]
        + [f"{e.success:.2f}", str(e.arms)]
        for e in arms.main_effects(rows)
    ]
    parts = [tables.text((header, body))]
    for title, score in SCORES.items():
        gains = [
            [defense]
            + [
                f"{gain:+.2f}"
                for gain in arms.contrasts(
                    [row for row in rows if row["defense"] == defense], score
                ).values()
            ]
            for defense in dict.fromkeys(row["defense"] for row in rows)
        ]
        parts += [
            f"Change of {title}, all else equal:",
            tables.text((["defense", *arms.contrasts(rows)], gains), rules=False),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    settings.run(main)
