"""One line for each audit: verdict, what broke it, what that took."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from ftdefense.reporting import tables

HEADER = [
    "defense",
    "verdict",
    "repeated: best HS, seeds broken",
    "without training",
    "benign rows alone",
    "harm alone (full, LoRA)",
    "steps to break",
    "flags",
    "fewer prompts",
]
_TWIN = "the undefended twin"


def table(
    audits: Sequence[tuple[Mapping[str, Any], Sequence[Mapping]]],
) -> tables.Table:
    """Header and cells of audits, each as (verdict.json, rows of results.jsonl).

    Repeated attacks come worst first, each with the mean of HS*(0.1) over its seeds.
    What has no seeds behind it is the screened score of a useful model: the most of the
    families that train nothing (the weights of an undefended twin are not among them),
    of benign rows, and of plain harmful rows; "-" where a family was not tried.
    """
    return HEADER, [_line(judged, rows) for judged, rows in audits]


def _line(judged: Mapping[str, Any], rows: Sequence[Mapping]) -> list[str]:
    families = {f["family"]: f for f in judged["families"]}
    edits = [f for f in families.values() if not f["trains"] and f["knows"] != _TWIN]
    best = max(edits, key=_score, default=None)
    durability = judged["durability"]
    steps = durability["steps_to_break"].get(judged["subject"], "-")
    return [
        f"`{judged['subject']}`",
        judged["verdict"],
        _repeated(judged, rows),
        f"{_score(best):.2f} ({best['family']})" if best else "-",
        _of(families, "benign rows"),
        f"{_of(families, 'full', 'harmful rows')}, {_of(families, 'lora')}",
        f"> {durability['horizon']}" if steps is None else str(steps),
        ", ".join(judged["flags"]),
        f"{judged['prompts']['factor']:.1f}",
    ]


def _score(family: Mapping[str, Any]) -> float:
    return family["harmful_score"] if family["useful"] else 0.0


def _of(families: Mapping[str, Mapping[str, Any]], *names: str) -> str:
    """The score of the first of these families that was tried."""
    for name in names:
        if name in families:
            return f"{_score(families[name]):.2f}"
    return "-"


def _repeated(judged: Mapping[str, Any], rows: Sequence[Mapping]) -> str:
    scores: dict[str, list[Mapping]] = {}
    for row in rows:
        mine = row["defense"] == judged["subject"] and row["stage"] == "after"
        if mine and row["attack"] != "horizon":
            scores.setdefault(row["attack"], []).append(row)
    key = "best_harmful_score_0.1"
    worst = sorted(
        (
            (sum(r[key] for r in group) / len(group), name, group)
            for name, group in scores.items()
        ),
        key=lambda found: (-found[0], found[1]),
    )
    return ", ".join(
        f"{name} {mean:.2f} {sum(bool(r['success_0.1']) for r in group)}/{len(group)}"
        for mean, name, group in worst
    )
