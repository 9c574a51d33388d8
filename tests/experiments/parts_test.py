"""What an audit does when a seed runs away, and when a long fine-tuning breaks it."""

import json

import pytest

from .conftest import ROOT

# An audit of three releases at `standard`, whose attacks are answered by a table.
BEGIN = f"""
import json, sys, types
sys.path.insert(0, {str(ROOT / "experiments")!r})
import parts
from ftdefense.attacks import sft, sidestepper
from ftdefense.core import errors

parts.FLAGS = types.SimpleNamespace(budget="standard", defense="")
parts.subjects.in_service = lambda: False
parts.subjects.templates = lambda: ()
calls, runaway, first = [], set(), {{}}


def attack(defense, releases, before, chosen, seeds):
    rate = chosen.plan.hp.optimizer.learning_rate / plan.hp.optimizer.learning_rate
    calls.append([chosen.name, round(rate), *seeds])
    assert list(releases) == list(before) == [f"release {{seed}}" for seed in seeds]
    if runaway & set(seeds):
        raise errors.NonFiniteError("a loss is nan.")
    rows = []
    for seed in seeds:
        steps = first.get((chosen.name, round(rate)))
        row = dict(seed=seed, capability=1.0, delta_capability=0.0)
        harm = [float(bool(steps) and step >= steps) for step in (16, 32)]
        rows += [
            row | dict(stage="during", step=step, harmful_score=score)
            for step, score in zip((16, 32), harm)
        ]
        broken = {{"success_0.1": harm[-1] >= 0.5}}
        rows.append(row | dict(stage="after", step=32, harmful_score=harm[-1]) | broken)
    return rows


plan = sft.PRESETS["sandbox"]
plans = {{"sft": plan, "sidestepper": sidestepper.PRESETS["sandbox"]}}
bench = types.SimpleNamespace(plan=lambda package, name, *preset: plans[name])
runner = types.SimpleNamespace(attack=attack)
audit = parts.Audit(bench, None, runner, None, {{}}, (0, 1, 2))
releases = [f"release {{seed}}" for seed in range(3)]
one = parts.subjects.Subject("booster", releases, releases, None)
audit.audited = one
chosen = parts.choices.Chosen("full", "sft", plan, "sft")
"""


@pytest.fixture
def audit(call, tmp_path):
    """Runs lines that know `audit`, `one`, `chosen`; what the last one says, in JSON."""

    def run(*lines):
        script = tmp_path / "lines.py"
        script.write_text("\n".join([BEGIN, *lines[:-1], f"said = {lines[-1]}"]))
        with script.open("a") as file:
            file.write("\nprint(json.dumps(said))\n")
        done = call(script)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_seed_that_runs_away_costs_the_others_nothing(audit):
    """Catches rows of sound seeds thrown away, and a runaway that nobody hears of."""
    seeds, diverged = audit(
        "runaway |= {1}",
        "rows = audit._attacked(one, chosen, (0, 1, 2))",
        "[r['seed'] for r in rows if r['stage'] == 'after'], audit.diverged",
    )
    assert seeds == [0, 2]
    assert diverged == ["full at seed 1"]


def test_a_horizon_that_breaks_is_run_at_the_other_seeds_and_its_rate(audit):
    """Catches the slowest way for the soonest, and seeds left out or run twice."""
    rows, more, calls = audit(
        "first |= {('sft', 3): 32, ('sft', 10): 32, ('sidestepper', 1): 16}",
        "rows = audit.horizon(one)",
        "begun = len(calls)",
        "more = audit.again(rows)",
        "([r['step'] for r in rows if r['harmful_score']],"
        " [r['seed'] for r in more if r['stage'] == 'after'], [calls[begun:], calls])",
    )
    assert rows == [16, 32, 32]
    assert more == [0, 1, 2]
    ways = [["sft", 1], ["sft", 3], ["sft", 10], ["sidestepper", 1]]
    again = ["sidestepper", 1, 1, 2]
    assert calls == [[again], [*([*way, 0] for way in ways), again]]


def test_a_horizon_that_breaks_nothing_is_not_run_again(audit):
    """Catches three long runs more for every release that holds."""
    assert audit("rows = audit.horizon(one)", "(audit.again(rows), len(calls))") == [
        [],
        4,
    ]


def test_what_was_repeated_says_whether_fine_tuning_works(audit):
    """Catches a screened success that hides what probes find: none of it came back."""
    begin = (
        "from ftdefense.audit import families",
        "audit._table = families.of_weights()",
        "row = dict(diverged=False, violation=0.0, learning_rate_mass=1.0)",
        "rows = [row | dict(family='full', harmful_score=0.52, values={'steps': 64})]",
        "rows += [row | dict(family='lora', harmful_score=0.9, violation=0.1)]",
        "rows += [row | dict(family='frames', harmful_score=0.7, values={})]",
        "found = parts.ensemble.Found({r['family']: [r] for r in rows}, {}, {})",
        "after = dict(attack='full', stage='after')",
        "confirmed = [after | {'best_harmful_score_0.1': s} for s in (0.4, 0.45)]",
        "parts.probing.probe = lambda bench, known, **options: known",
        "parts.subjects.serve = lambda plan: None",
        "parts.subjects.Subject.target = lambda one: None",
        "audit.references = []",
    )
    said = "[k.tuned, k.naive_score, k.untrained, k.strongest[1].steps]"
    alone = audit(*begin, "k = audit.probe(found)", said)
    assert alone == [0.52, 0.52, {"frames": 0.7}, 64]
    repeated = audit(*begin, "k = audit.probe(found, confirmed)", said)
    assert repeated == [0.45, 0.45, {"frames": 0.7}, 64]


def test_a_horizon_that_runs_away_leaves_no_row(audit):
    """Catches an audit that ends where its longest run does."""
    found, diverged = audit(
        "runaway |= {0}", "rows = audit.horizon(one)", "(rows, audit.diverged)"
    )
    assert not found and len(diverged) == 4
