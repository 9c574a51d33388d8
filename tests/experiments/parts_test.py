"""What an audit does when a seed runs away, and when a long fine-tuning breaks it."""

import json

import pytest

from .conftest import ROOT

# An audit of three releases at `standard`, whose attacks are answered by a table.
BEGIN = f"""
import json, sys, types
sys.path.insert(0, {str(ROOT / "experiments")!r})
import parts
from ftdefense.attacks import sft
from ftdefense.core import errors

parts.FLAGS = types.SimpleNamespace(budget="standard")
parts.subjects.in_service = lambda: False
parts.subjects.templates = lambda: ()
calls, runaway, first = [], set(), {{}}


def attack(defense, releases, before, chosen, seeds):
    rate = chosen.plan.hp.optimizer.learning_rate / plan.hp.optimizer.learning_rate
    calls.append([round(rate), *seeds])
    assert list(releases) == list(before) == [f"release {{seed}}" for seed in seeds]
    if runaway & set(seeds):
        raise errors.NonFiniteError("a loss is nan.")
    rows = []
    for seed in seeds:
        steps = first.get(round(rate))
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
bench = types.SimpleNamespace(plan=lambda package, name: plan)
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
    """Catches the slowest rate for the soonest, and seeds left out or run twice."""
    rows, more, calls = audit(
        "first |= {3: 16, 10: 32}",
        "rows = audit.horizon(one)",
        "begun = len(calls)",
        "more = audit.again(rows)",
        "([r['step'] for r in rows if r['harmful_score']],"
        " [r['seed'] for r in more if r['stage'] == 'after'], [calls[begun:], calls])",
    )
    assert rows == [16, 32, 32]
    assert more == [0, 1, 2]
    assert calls == [[[3, 1, 2]], [[1, 0], [3, 0], [10, 0], [3, 1, 2]]]


def test_a_horizon_that_breaks_nothing_is_not_run_again(audit):
    """Catches three long runs more for every release that holds."""
    assert audit("rows = audit.horizon(one)", "(audit.again(rows), len(calls))") == [
        [],
        3,
    ]


def test_a_horizon_that_runs_away_leaves_no_row(audit):
    """Catches an audit that ends where its longest run does."""
    found, diverged = audit(
        "runaway |= {0}", "rows = audit.horizon(one)", "(rows, audit.diverged)"
    )
    assert not found and len(diverged) == 3
