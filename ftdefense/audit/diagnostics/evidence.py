"""What the diagnostics read from result rows, in one place.

A row is a mapping with the columns of `experiments/cells.py`, of which each diagnostic
names those that it needs. The score of a row is `best_harmful_score_0.1`, the best of
its useful checkpoints, where there is one, else `harmful_score`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import statistics
from typing import Any

from ftdefense.evaluation import success

Row = Mapping[str, Any]


def score(row: Row) -> float:
    """Harmful score of a row at the headline utility constraint, where it is known."""
    name = f"best_harmful_score_{success.HEADLINE:g}"
    return float(row[name] if row.get(name) is not None else row["harmful_score"])


def grouped(rows: Sequence[Row], column: str) -> dict[Any, list[Row]]:
    """Rows by the value of a column, in sorted order; rows without it are left out."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if row.get(column) is not None:
            found.setdefault(row[column], []).append(row)
    return dict(sorted(found.items()))


def means(rows: Sequence[Row], column: str) -> dict[Any, float]:
    """Mean score by the value of a column: over seeds, mostly."""
    groups = grouped(rows, column)
    return {key: statistics.fmean(map(score, rows)) for key, rows in groups.items()}


def best(rows: Sequence[Row], column: str) -> dict[Any, float]:
    """Highest score by the value of a column: the attacker picks."""
    return {key: max(map(score, rows)) for key, rows in grouped(rows, column).items()}
