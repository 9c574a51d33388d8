"""Reads the fixed header of a method's docstring, of which tables are made."""

import re
import types as python_types

FIELDS = (
    "Stage",
    "Threat",
    "Starts from",
    "Template",
    "Strategy",
    "Minimises",
    "Source",
    "Evidence",
    "Licence",
    "Differs",
    "Reduces to",
    "Cost",
)
_HEADER = re.compile(rf"^({'|'.join(FIELDS)})\s{{2,}}(.*)$")


def card(module: python_types.ModuleType) -> dict[str, str]:
    """Header fields of a method's module docstring, with `Name` and `Summary`.

    The first line reads `Name: what it does.`; every field starts a line with its name
    and at least two spaces, and goes on over indented lines. Absent fields are absent.
    """
    lines = (module.__doc__ or "").strip().splitlines()
    first, _, _ = "\n".join(lines).partition("\n\n")
    name, _, summary = " ".join(first.split()).partition(": ")
    fields = {"Name": name, "Summary": summary}
    current = None
    for line in lines:
        match = _HEADER.match(line)
        if match:
            current, text = match.groups()
            fields[current] = text.strip()
        elif current and line.startswith(" "):
            fields[current] += " " + line.strip()
        else:
            current = None
    return fields
