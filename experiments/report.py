"""Writes table, plots and report.html again from a finished run's rows.

python experiments/report.py --workdir=runs/first
"""

import json
import pathlib

from absl import flags
import settings

from ftdefense.core import errors
from ftdefense.evaluation import checks
from ftdefense.reporting import page
from ftdefense.reporting import plots
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables

flags.adopt_module_key_flags(settings)


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes changes.png, curves.png, table.md and report.html; returns the page."""
    rows = result_rows.read(workdir / "results.jsonl")
    path = workdir / "manifest.json"
    if not path.is_file():
        raise errors.UserError(f"{workdir} holds no manifest.json; run run.py again.")
    images = [
        (
            "Change from the defended model",
            plots.bars(rows, workdir / "changes.png"),
        ),
        ("Along the attack", plots.curves(rows, workdir / "curves.png")),
    ]
    table = tables.final(rows)
    result_rows.write_text(workdir / "table.md", tables.markdown(table) + "\n")
    html = page.render(rows, images, json.loads(path.read_text()), checks.REASONS)
    result_rows.write_text(workdir / "report.html", html)
    return workdir / "report.html"


def main() -> None:
    workdir = settings.workdir()
    written = write(workdir)
    rows = result_rows.read(workdir / "results.jsonl")
    print(tables.text(tables.final(rows)))
    print(f"\n{written}")


if __name__ == "__main__":
    settings.run(main)
