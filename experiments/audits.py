"""Audits side by side: verdicts, worst cases, and what each reached at equal cost.

  python experiments/audits.py --audits=runs/seam,runs/seam-sweep --workdir=runs/seam-both

prints one line for each work directory of audit.py. An ensemble is compared with a plain
sweep (--families=full --trials=40) at the gradient passes of whoever spent least. With
--workdir the curves of effort are drawn there. --markdown prints what broke each and
what that took, as the tables of BUILD_NOTES.md do. Runs no model.
"""

import json
import pathlib
from typing import Any

from absl import flags
import settings

from ftdefense.audit import effort
from ftdefense.audit import studies
from ftdefense.core import errors
from ftdefense.reporting import audit_plots
from ftdefense.reporting import audit_table
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables

FLAGS = flags.FLAGS
flags.DEFINE_list("audits", [], "Work directories of audit.py, comma-separated.")
flags.DEFINE_bool("markdown", False, "Print what broke each release, in Markdown.")
flags.adopt_module_key_flags(settings)


def main() -> None:
    if not FLAGS.audits:
        raise errors.UserError(
            "--audits is missing: name work directories of audit.py."
        )
    found = {folder: _read(pathlib.Path(folder)) for folder in FLAGS.audits}
    if FLAGS.markdown:
        audited = [
            (judged, result_rows.read(pathlib.Path(folder) / "results.jsonl"))
            for folder, (judged, _, _) in found.items()
        ]
        print(tables.markdown(audit_table.table(audited)))
        return
    least = min(curve[-1]["passes"] for _, curve, _ in found.values())
    header = ["audit", "of", "trials", "passes", "best HS", "family"]
    header += [f"at {least} passes", "verdict", "flags"]
    body = [_line(folder, *one, least) for folder, one in found.items()]
    print(tables.text((header, body), False))
    if FLAGS.workdir:
        workdir = settings.workdir()
        workdir.mkdir(parents=True, exist_ok=True)
        curves = {folder: curve for folder, (_, curve, _) in found.items()}
        print(f"\n{audit_plots.effort(curves, workdir / 'effort.png')}")


def _read(folder: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, float]], str]:
    """Verdict of an audit, its subject's curve of effort, and the worst family.

    Raises:
      UserError: if the folder holds no finished audit.
    """
    if not (folder / "verdict.json").is_file():
        raise errors.UserError(
            f"--audits={folder}: no verdict.json there; run audit.py --workdir={folder}."
        )
    judged = json.loads((folder / "verdict.json").read_text())
    trials = result_rows.read(folder / "trials.jsonl")
    mine = [row for row in trials if row["target"] == judged["subject"]]
    worst = studies.best(mine)
    family = worst["family"] if worst and worst["violation"] <= 0 else "none"
    return judged, effort.curve(mine), family


def _line(
    folder: str,
    judged: dict[str, Any],
    curve: list[dict[str, float]],
    family: str,
    least: int,
) -> list[str]:
    within = [at["best_harmful_score"] for at in curve if at["passes"] <= least]
    return [
        folder,
        judged["subject"],
        str(curve[-1]["trials"]),
        str(curve[-1]["passes"]),
        f"{curve[-1]['best_harmful_score']:.2f}",
        family,
        f"{max(within, default=0.0):.2f}",
        judged["verdict"],
        ",".join(judged["flags"]),
    ]


if __name__ == "__main__":
    settings.run(main)
