"""Method cards and the README's tables, from the headers of the methods' docstrings."""

from collections.abc import Mapping
from collections.abc import Sequence
import re

Card = Mapping[str, str]

# Between these lines of the README stands what `readme` writes.
BEGIN, END = "<!-- {} begin -->", "<!-- {} end -->"


def card(name: str, fields: Card, presets: Mapping[str, str]) -> str:
    """One card in Markdown.

    Args:
      name: of the file, as `--defense` takes it.
      fields: header of the docstring (`core.cards.card`).
      presets: {preset: where its numbers are from}.
    """
    lines = [f"# {fields['Name']}", "", fields["Summary"], "", f"`{name}`", ""]
    lines += ["| field | |", "| --- | --- |"]
    lines += [
        f"| {field} | {_cell(text)} |"
        for field, text in fields.items()
        if field not in ("Name", "Summary")
    ]
    lines += ["", "| preset | source of its numbers |", "| --- | --- |"]
    lines += [f"| `{preset}` | {_cell(text)} |" for preset, text in presets.items()]
    return "\n".join(lines) + "\n"


def table(cards: Mapping[str, Card], columns: Sequence[str]) -> str:
    """A Markdown table of methods by name; cells are the first clause of a field."""
    header = ["", *(column.lower() for column in columns), "what it does"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, fields in cards.items():
        clauses = [first_clause(fields.get(column, "")) for column in columns]
        cells = [f"`{name}`", *clauses, _cell(fields["Summary"].rstrip("."))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def first_clause(text: str) -> str:
    """Up to the first `;`, `,` or full stop."""
    return _cell(re.split(r"[;,]|\.(?:\s|$)", text, maxsplit=1)[0].strip()) or "-"


def readme(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each named table between its two marks.

    Raises:
      ValueError: if a mark is missing.
    """
    for name, made in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in text or end not in text:
            raise ValueError(f"README has no marks {begin} and {end}.")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{made}\n{end}{after}"
    return text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
