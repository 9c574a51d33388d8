"""Result rows: one JSON object a line, and the same as CSV; written whole."""

from collections.abc import Iterable
from collections.abc import Mapping
import csv
import json
import os
import pathlib
from typing import Any

from ftdefense.core import errors

Row = Mapping[str, Any]
KEY = ("defense", "attack", "seed", "stage", "step", "setting")
KEY += ("target", "family", "trial")  # Of an audit.


def key(row: Row) -> tuple[Any, ...]:
    """What no two rows of one file may share."""
    return tuple(row.get(name) for name in KEY)


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Writes `path` (.jsonl) and its .csv twin.

    Raises:
      UserError: if two rows have the same key: one would hide the other.
    """
    rows = list(rows)
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        if key(row) in seen:
            raise errors.UserError(f"two result rows share the key {key(row)}.")
        seen.add(key(row))
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    _replace(path, text)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path.with_suffix(".csv"))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a results.jsonl.

    Raises:
      UserError: if it is not there, or a line is not JSON.
    """
    if not path.is_file():
        raise errors.UserError(
            f"no results at {path}; run experiments/run.py --workdir={path.parent}."
        )
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise errors.UserError(f"{path}, line {number}: not JSON.") from error
    return rows


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    _replace(path, text)


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
