"""Cards and README tables say what the docstrings say."""

import pathlib

import pytest

from ftdefense.core import cards
from ftdefense.core import registry
from ftdefense.reporting import method_cards

ROOT = pathlib.Path(__file__).parents[2]


def test_readme_tables_are_those_of_the_docstrings():
    """Catches a method that is added, or described anew, without
    `python experiments/report.py --workdir=... --cards --readme=README.md`.
    """
    text = (ROOT / "README.md").read_text()
    for package, columns in (
        ("defenses", ("Stage", "Template", "Strategy")),
        ("attacks", ("Threat",)),
    ):
        made = method_cards.table(
            {n: cards.card(registry.load(package, n)) for n in registry.names(package)},
            columns,
        )
        assert made in text, package


def test_tables_land_between_their_marks():
    """Catches text around the marks that is lost, and a mark that is missing."""
    text = "a\n<!-- x begin -->\nold\n<!-- x end -->\nb"
    made = method_cards.readme(text, {"x": "new"})
    assert made == "a\n<!-- x begin -->\nnew\n<!-- x end -->\nb"
    assert method_cards.readme(made, {"x": "new"}) == made
    with pytest.raises(ValueError, match="y begin"):
        method_cards.readme(text, {"y": ""})


def test_cells_are_safe_and_short():
    """Catches a bar that opens a new column, and a whole sentence in a cell."""
    assert method_cards.first_clause("T1 basin; or so.") == "T1 basin"
    assert method_cards.first_clause("alignment, of a twin") == "alignment"
    assert method_cards.first_clause("") == "-"
    fields = {"Name": "X", "Summary": "s.", "Minimises": "|a|"}
    assert "\\|a\\|" in method_cards.card("x", fields, {"sandbox": "DESIGN"})
