"""Processes that share one command's work."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT
from .own_model_test import flags
from .own_model_test import folder  # noqa: F401  A fixture.


def python(lines, *arguments, **options):
    """Runs lines in a process that has imported `workers` and parsed the arguments."""
    begin = ["import os, sys, workers", "workers.FLAGS(sys.argv)"]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join([*begin, *lines]), *arguments],
        cwd=ROOT / "experiments",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_work_is_shared(call, tmp_path, folder):  # noqa: F811
    """Catches a stage that nobody trains or two do, and workers that leave none to read."""
    asked = ("--defense=none", "--attack=sft", "--seeds=0,1", "--jobs=2")
    done = call("run.py", *flags(tmp_path, folder, *asked))
    assert done.returncode == 0, done.stderr
    trained = [line.split()[:3] for line in done.stderr.splitlines()]
    stages = [
        [f"{name}", "seed", s]
        for name in ("attacked-sft", "defended-none")
        for s in "01"
    ]
    assert sorted(trained) == stages
    assert not (tmp_path / "w" / "claims").exists()
    lines = (tmp_path / "w" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["seed"] for row in rows if row["stage"] != "during"] == [0, 0, 1, 1]


def test_what_stops_a_worker_is_one_line(call, tmp_path, folder):  # noqa: F811
    """Catches an error that is printed twice, or that leaves no reason behind."""
    asked = ("--defense=none", "--attack=sft", "--seeds=0,1", "--jobs=2")
    diverging = "--set=defense.optimizer.learning_rate=inf"
    done = call("run.py", *flags(tmp_path, folder, *asked, diverging))
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step" in said[0], done.stderr
    assert not (tmp_path / "w" / "results.jsonl").exists()


def test_a_unit_is_done_once(tmp_path):
    """Catches a claim that does not last, and one of a unit that another has finished."""
    lines = (
        "done = []",
        "units = [(name, lambda name=name: done.append(name)) for name in 'ab']",
        "workers._claims().mkdir()",
        "held = workers._claim('a')",
        "assert held.__enter__()",
        "workers.share(units)",
        "held.__exit__(None, None, None)",
        "workers._HELD.clear()",
        "workers.share(units)",
        "print(*done)",
    )
    done = python(lines, f"--workdir={tmp_path}")
    assert done.communicate()[0].split() == ["b"]


def test_a_worker_ends_with_its_parent():
    """Catches a worker that trains on after its command was killed."""
    lines = ("assert workers.enlisted()", "print('here', flush=True)")
    lines += ("import time", "time.sleep(600)")
    worker = python(lines, "--worker=0/1")
    assert worker.stdout.readline() == "here\n"
    worker.stdin.close()
    assert worker.wait(timeout=60) == 1


def test_how_many_and_where():
    """Catches copies of a user's own model, more workers than units, and an idle core."""
    lines = (
        "from absl.testing import flagsaver",
        "def count(**flags):",
        "    with flagsaver.flagsaver(**flags):",
        "        return workers.count(4)",
        "print(count(), count(jobs=3), count(jobs=9), count(model='x'), count(mesh='y'))",
        "for number, cores in (2, [0, 3, 5]), (3, [4, 5, 6]), (3, [1, 2]):",
        "    print([workers._part(cores, i, number) for i in range(number)])",
    )
    counts, *parts = python(lines).communicate()[0].splitlines()
    every = min(4, len(os.sched_getaffinity(0)))
    assert counts == f"{every} 3 4 1 1"
    assert parts == ["[[0], [3, 5]]", "[[4], [5], [6]]", "[[1], [2], [1]]"]
