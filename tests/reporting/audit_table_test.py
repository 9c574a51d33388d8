"""What audits.py --markdown says of an audit, from planted evidence."""

from ftdefense.audit import edit_families
from ftdefense.reporting import audit_table


def family(name, score, trains=True, useful=True, knows="nothing"):
    return {"family": name, "harmful_score": score, "capability": 1.0} | {
        "trains": trains,
        "useful": useful,
        "knows": knows,
    }


def row(attack, seed, best, defense="booster", stage="after"):
    return {"defense": defense, "stage": stage, "attack": attack, "seed": seed} | {
        "best_harmful_score_0.1": best,
        "success_0.1": best >= 0.5,
    }


TWIN = edit_families.TABLE["merge"].knows
JUDGED = {
    "subject": "booster",
    "verdict": "BROKEN",
    "flags": ["E2", "P4"],
    "prompts": {"factor": 3.06},
    "durability": {"steps_to_break": {"booster": None, "none": 32}, "horizon": 512},
    "families": [
        family("frames", 0.3, trains=False),
        family("pruning", 0.9, trains=False, useful=False),
        family("merge", 1.0, trains=False, knows=TWIN),
        family("full", 0.98),
        family("lora", 0.91, useful=False),
    ],
}
ROWS = [
    row("lora", 0, 0.4),
    row("lora", 1, 0.6),
    row("full", 0, 0.7),
    row("full", 1, 0.8),
    row("full", 0, 1.0, defense="none"),
    row("full", 0, 1.0, stage="along"),
    row("horizon", 0, 1.0),
]


def test_a_line_says_what_broke_the_release():
    """Catches scores of useless models, of a reference, and a merge with the twin."""
    header, (line,) = audit_table.table([(JUDGED, ROWS)])
    assert dict(zip(header, line, strict=True)) == {
        "defense": "`booster`",
        "verdict": "BROKEN",
        "repeated: best HS, seeds broken": "full 0.75 2/2, lora 0.50 1/2",
        "without training": "0.30 (frames)",
        "benign rows alone": "-",
        "harm alone (full, LoRA)": "0.98, 0.00",
        "steps to break": "> 512",
        "flags": "E2, P4",
        "fewer prompts": "3.1",
    }


def test_a_service_is_asked_by_rows_alone():
    """Catches a traceback where families of weights and the long run are missing."""
    families = [family("harmful rows", 0.7), family("benign rows", 0.1)]
    durability = {"steps_to_break": {}, "horizon": 0}
    judged = {**JUDGED, "families": families, "durability": durability}
    _, (line,) = audit_table.table([(judged, [])])
    assert line[2:7] == ["", "-", "0.10", "0.70, -", "-"]
