"""Writes table, plots and report.html again from a finished run's rows, or the cards.

  python experiments/report.py --workdir=runs/first
  python experiments/report.py --workdir=runs/cards --cards

`--cards` writes one card for each method into the work directory, from its docstring;
with --readme=README.md also the tables of methods there.
"""

import json
import pathlib

from absl import flags
import settings

from ftdefense.core import cards
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.evaluation import checks
from ftdefense.reporting import method_cards
from ftdefense.reporting import page
from ftdefense.reporting import plots
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.DEFINE_bool("cards", False, "Write method cards instead of a run's report.")
flags.DEFINE_string("readme", None, "With --cards: the file whose tables to renew.")

COLUMNS = {
    "defenses": ("Stage", "Template", "Strategy"),
    "attacks": ("Threat",),
}


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
    ]
    if any(row["stage"] == "during" for row in rows):  # Edits have no way to look at.
        path_curves = plots.curves(rows, workdir / "curves.png")
        images.append(("Along the attack", path_curves))
    table = tables.final(rows)
    result_rows.write_text(workdir / "table.md", tables.markdown(table) + "\n")
    html = page.render(rows, images, json.loads(path.read_text()), checks.REASONS)
    result_rows.write_text(workdir / "report.html", html)
    return workdir / "report.html"


def method_tables() -> dict[str, str]:
    """The README's tables of defenses and attacks."""
    return {
        package: method_cards.table(
            {
                name: cards.card(registry.load(package, name))
                for name in registry.names(package)
            },
            columns,
        )
        for package, columns in COLUMNS.items()
    }


def write_cards(workdir: pathlib.Path) -> None:
    """<workdir>/<package>/<name>.md for every method, and the README's tables."""
    for package in COLUMNS:
        folder = workdir / package
        folder.mkdir(parents=True, exist_ok=True)
        for name in registry.names(package):
            module = registry.load(package, name)
            presets = {key: plan.source for key, plan in module.PRESETS.items()}
            text = method_cards.card(name, cards.card(module), presets)
            result_rows.write_text(folder / f"{name}.md", text)
        print(f"{folder}: {len(registry.names(package))} cards")
    if FLAGS.readme:
        path = pathlib.Path(FLAGS.readme)
        text = method_cards.readme(path.read_text(), method_tables())
        result_rows.write_text(path, text)
        print(path)


def main() -> None:
    workdir = settings.workdir()
    if FLAGS.cards:
        write_cards(workdir)
        return
    written = write(workdir)
    rows = result_rows.read(workdir / "results.jsonl")
    print(tables.text(tables.final(rows)))
    print(f"\n{written}")


if __name__ == "__main__":
    settings.run(main)
