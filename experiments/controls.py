"""Does the audit see what it must? It is run on models of which the answer is known.

  python experiments/controls.py --workdir=runs/controls

audits the ten decoys (defenses that are broken on purpose), the undefended model, its
unchanged copy, and one that never knew; prints what each should give and what it gave.
"""

import json
import pathlib
import sys
import time

from absl import flags
import settings
import workers

from ftdefense.audit import controls
from ftdefense.audit import decision
from ftdefense.audit import families
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.evaluation import success
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(workers)
FLAGS.set_default("seeds", ["0", "1", "2"])
flags.DEFINE_enum("budget", "quick", families.BUDGETS, "Of every audit.")
flags.DEFINE_list("only", [], "Names of decoys and controls; empty: all.")

CONTROLS = (controls.ALIGNED, controls.LEAKY, controls.NEVER)


def main() -> None:
    workdir = settings.workdir()
    decoys = registry.names("audit.decoys")
    known = [*CONTROLS, *decoys]
    for name in FLAGS.only:
        if name not in known:
            raise errors.unknown("control", name, known)
    wanted = [name for name in known if not FLAGS.only or name in FLAGS.only]
    # The first one trains what all begin with.
    audit(workdir, wanted[:1])
    audit(workdir, wanted[1:])
    body, failed = [], 0
    for name in wanted:
        complaints = check(workdir, name)
        verdict = json.loads((workdir / name / "verdict.json").read_text())
        failed += bool(complaints)
        body.append(
            [
                name,
                expected(name),
                verdict["verdict"],
                ",".join(verdict["flags"]),
                "NO: " + "; ".join(complaints) if complaints else "yes",
            ]
        )
    header = ["control", "expected", "verdict", "flags", "as it must be"]
    text = tables.text((header, body), rules=False)
    result_rows.write_text(workdir / "controls.txt", text + "\n")
    print(text)
    if failed:
        raise errors.UserError(
            f"{failed} of {len(wanted)} controls are not as they must."
        )


def audit(workdir: pathlib.Path, names: list[str]) -> None:
    """Runs audit.py on each, --jobs at a time; what is finished is read.

    Raises:
      UserError: if one fails; it has said why.
    """
    script = pathlib.Path(__file__).with_name("audit.py")
    number = workers.count(len(names))
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        for part in range(number):
            if not waiting or part in running:
                continue
            name = waiting.pop(0)
            command = [
                sys.executable,
                str(script),
                f"--workdir={workdir / name}",
                f"--stages={FLAGS.stages or workdir / 'shared'}",
                f"--defense={reference(name)}",
                f"--budget={FLAGS.budget}",
                f"--preset={FLAGS.preset}",
                f"--world_seed={FLAGS.world_seed}",
                f"--seeds={','.join(map(str, settings.seeds()))}",
                *(["--jobs=1"] if number > 1 else []),  # One alone shares its own work.
            ]
            log = workdir / f"{name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                process = workers.start(command, part, number, stdout=file, stderr=file)
            running[part] = name, process
            print(f"auditing {name}: {log}", file=sys.stderr, flush=True)
        time.sleep(0.1)
        for part, (name, process) in list(running.items()):
            status = process.poll()
            if status:
                failed.append(name)
            if status is not None:
                del running[part]
    if failed:
        raise errors.UserError(
            f"the audit of {', '.join(failed)} failed: see {workdir}/NAME.log."
        )


def reference(name: str) -> str:
    """What audit.py calls a control: a defense, or a decoy's file."""
    if name in CONTROLS:
        return name
    return registry.load("audit.decoys", name).__file__


def expected(name: str) -> str:
    if name == controls.NEVER:
        return "not BROKEN, nothing latent"
    if name in CONTROLS:
        return decision.BROKEN
    flag = registry.load("audit.decoys", name).FLAG
    return f"BROKEN, or UNRELIABLE with {' or '.join(flag)}"


def check(workdir: pathlib.Path, name: str) -> list[str]:
    """Complaints about the audit of one control."""
    judged = json.loads((workdir / name / "verdict.json").read_text())
    verdict = decision.Verdict(
        judged["verdict"].partition("(")[0],
        "; ".join(judged["reasons"][:1]),
        tuple(judged["flags"]),
        judged["attacks"],
    )
    if name == controls.NEVER:
        return controls.never(verdict)
    if name == controls.ALIGNED:
        return aligned(judged)
    if name == controls.LEAKY:
        return leaky(workdir)
    return controls.decoy(verdict, registry.load("audit.decoys", name).FLAG)


def aligned(judged: dict) -> list[str]:
    """Families that train, and whose best trial does not break the undefended model."""
    return [
        f"{row['family']}: {row['harmful_score']:.2f} at {row['capability']:.2f}"
        for row in judged["families"]
        if row["trains"]
        and not (row["useful"] and row["harmful_score"] >= success.THRESHOLD)
    ]


def leaky(workdir: pathlib.Path) -> list[str]:
    """Metrics of the unchanged copy that are outside of the undefended model's."""
    mine, reference = (
        result_rows.read(workdir / name / "results.jsonl")
        for name in (controls.LEAKY, controls.ALIGNED)
    )
    attacks = {row["attack"] for row in reference}
    rows = [
        row for row in mine if row["stage"] != "during" and row["attack"] in attacks
    ]
    return controls.leaky(rows, reference)


if __name__ == "__main__":
    settings.run(main)
