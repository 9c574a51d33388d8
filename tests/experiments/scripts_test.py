"""The other scripts on a user's own folder of weights: each runs, and says what it found."""

import json

from ..data.data_test import pairs
from ..data.data_test import write
from .own_model_test import flags
from .own_model_test import folder  # noqa: F401


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_coefficients_are_tuned_for_every_stage(call, tmp_path, folder):  # noqa: F811
    """Catches a script that asks for a flag which it lacks, a service that is attacked
    as a release, and an edit of which another setting is kept."""
    task = write(tmp_path / "t.jsonl", pairs("sort"))
    given = flags(tmp_path, folder, f"--task={task}")
    few = ["--set=attack.data.sample_count=8", "--set=attack.data.poison_ratio=0.5"]
    rates = "--grid=optimizer.learning_rate=1e-4,1e-3"
    for more in (
        ["--defense=vaccine,safegrad", rates],
        ["--defense=antidote_pruning", "--grid=alpha=0,0.5"],
    ):
        done = call("tune.py", *given, *few, *more)
        assert done.returncode == 0, done.stderr
    rows = results(tmp_path / "w" / "tune.jsonl")
    assert [(row["defense"], row["setting"]) for row in rows] == [
        ("vaccine", "optimizer.learning_rate=1e-4"),
        ("vaccine", "optimizer.learning_rate=1e-3"),
        ("safegrad", "optimizer.learning_rate=1e-4"),
        ("safegrad", "optimizer.learning_rate=1e-3"),
        ("antidote_pruning", "alpha=0"),
        ("antidote_pruning", "alpha=0.5"),
    ]
    for row in rows:
        assert not row["diverged"] and "capability_before" in row
        assert "harmful_score_after" in row and "admissible" in row


def test_a_service_is_not_tuned_without_its_task(call, tmp_path, folder):  # noqa: F811
    """Catches a traceback, and an hour of training before it."""
    done = call("tune.py", *flags(tmp_path, folder, "--defense=safegrad"))
    assert done.returncode == 2
    assert "--task" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "w" / "tune.jsonl").exists()


def test_a_sweep_has_a_row_for_every_setting(call, tmp_path, folder):  # noqa: F811
    """Catches a setting that is missing, and rows of one setting under two names."""
    given = flags(tmp_path, folder, "--sweep=optimizer.learning_rate=0,1e-2")
    done = call("sweep.py", *given)
    assert done.returncode == 0, done.stderr
    rows = results(tmp_path / "w" / "sweep.jsonl")
    assert [row["optimizer.learning_rate"] for row in rows] == ["0", "1e-2"]
    assert rows[1]["loss_harmful"] < rows[0]["loss_harmful"] - 0.1
