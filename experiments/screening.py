"""How many prompts does screening save, and is its verdict that of the full set?

  python experiments/screening.py --workdir=runs/all

replays the sequential test of an audit on the generations that run.py saved there: every
cell was judged on all held-out prompts, so that both verdicts are known. Runs no model.
"""

import collections
import pathlib

from absl import flags
import settings

from ftdefense.evaluation import screening
from ftdefense.evaluation import success
from ftdefense.evaluation import suite
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables

flags.adopt_module_key_flags(settings)

Cell = tuple[str, str, int]  # Defense, attack ("" before any), seed.


def main() -> None:
    workdir = settings.workdir()
    references = {
        (row["defense"], row["seed"]): row["capability"]
        for row in result_rows.read(workdir / "results.jsonl")
        if row["stage"] == "before"
    }
    replayed = [
        _replay(cell, said, references)
        for cell, said in _generations(workdir / "generations.jsonl").items()
    ]
    result_rows.write(workdir / "screening.jsonl", replayed)
    by_defense: dict[str, list[dict]] = {"all": replayed}
    for row in replayed:
        by_defense.setdefault(row["defense"], []).append(row)
    header = ["defense", "cells", "fewer prompts", "other verdicts"]
    print(tables.text((header, [_line(*one) for one in by_defense.items()]), False))


def _generations(
    path: pathlib.Path,
) -> dict[Cell, dict[str, list[suite.Generation]]]:
    """Of every cell and group, what was said, in the order of screening."""
    cells: dict[Cell, dict[str, list[suite.Generation]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for row in result_rows.read(path):
        cell = row["defense"], row["attack"], row["seed"]
        said = suite.Generation(
            row["group"], row["topic"], row["prompt"], row["response"], row["verdict"]
        )
        cells[cell][row["group"]].append(said)
    return {
        cell: {group: screening.mixed(groups[group]) for group in ("harmful", "benign")}
        for cell, groups in cells.items()
    }


def _replay(cell: Cell, groups, references) -> dict:
    """Both verdicts of one cell, and what each of them cost."""
    defense, attack, seed = cell
    least = (1 - success.HEADLINE) * references[defense, seed]
    courses, full = {}, {}
    for group, threshold in (("harmful", success.THRESHOLD), ("benign", least)):
        size = len(groups[group])
        courses[group] = screening.Course(size, threshold)
        full[group] = screening.Course(size, threshold)
        full[group].look(groups[group])
    screening.sequential(lambda group, a, b: groups[group][a:b], courses)
    return {
        "defense": defense,
        "attack": attack,
        "seed": seed,
        "prompts": sum(len(course.said) for course in courses.values()),
        "prompts_full": sum(course.size for course in courses.values()),
        "success": all(course.settled for course in courses.values()),
        "success_full": all(course.settled for course in full.values()),
    }


def _line(name: str, replayed: list[dict]) -> list[str]:
    used = sum(row["prompts"] for row in replayed)
    full = sum(row["prompts_full"] for row in replayed)
    other = sum(row["success"] != row["success_full"] for row in replayed)
    return [name, str(len(replayed)), f"{full / used:.2f} x", str(other)]


if __name__ == "__main__":
    settings.run(main)
