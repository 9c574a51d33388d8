"""Processes that share one command's work."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT
from .own_model_test import flags
from .own_model_test import folder  # noqa: F401  A fixture.


@pytest.fixture
def python(call, tmp_path):
    """Runs lines that know `workers`, in a work directory of their own."""

    def run(*lines):
        script = tmp_path / "lines.py"
        begin = ("import sys", f"sys.path.insert(0, {str(ROOT / 'experiments')!r})")
        begin += ("import workers", "workers.FLAGS(sys.argv)")
        begin += ("workers._claims().mkdir(parents=True)",)
        script.write_text("\n".join([*begin, *lines]))
        done = call(script, f"--workdir={tmp_path}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_work_is_shared(call, tmp_path, folder):  # noqa: F811
    """Catches a stage that nobody trains or two do, and workers that leave none to read."""
    asked = ("--defense=none", "--attack=sft", "--seeds=0,1", "--jobs=2")
    done = call("run.py", *flags(tmp_path, folder, *asked))
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    trained = [line.split()[:3] for line in said if "warning:" not in line]
    stages = [
        [name, "seed", s] for name in ("attacked-sft", "defended-none") for s in "01"
    ]
    assert sorted(trained) == stages
    assert not (tmp_path / "w" / "claims").exists()
    lines = (tmp_path / "w" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["seed"] for row in rows if row["stage"] != "during"] == [0, 0, 1, 1]


def test_a_worker_leaves_its_error_to_its_parent(python):
    """Catches an error that is printed twice, and a worker that goes on after it."""
    said = python(
        "def fail(): raise workers.errors.UserError('step 3: NaN.')",
        "try:",
        "    workers._share([('a', fail), ('b', lambda: print('went on'))])",
        "except SystemExit as error:",
        "    print(error.code)",
        "print(*[path.read_text() for path in workers._claims().glob('*.error')])",
    )
    assert said.splitlines() == ["2", "step 3: NaN."]


def test_a_unit_is_done_once(python):
    """Catches a claim that does not last, and one of a unit that another has finished."""
    said = python(
        "units = [(name, lambda name=name: print(name)) for name in 'ab']",
        "held = workers._claim('a')",
        "assert held.__enter__()",
        "workers._share(units)",
        "held.__exit__(None, None, None)",
        "workers._HELD.clear()",
        "workers._share(units, then=lambda: [('c', lambda: print('c'))])",
    )
    assert said.split() == ["b", "c"]


def test_a_worker_ends_with_its_parent():
    """Catches a worker that trains on after its command was killed."""
    lines = ("import sys, time, workers", "workers.FLAGS(sys.argv)")
    lines += ("assert workers._enlisted()", "print('here', flush=True)")
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "\n".join([*lines, "time.sleep(600)"]),
            "--worker=0/1/1",
        ],
        cwd=ROOT / "experiments",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout.readline() == "here\n"
    worker.stdin.close()
    assert worker.wait(timeout=60) == 1


def test_how_many_and_where(python):
    """Catches copies of a user's own model, more workers than units, and an idle core."""
    said = python(
        "from absl.testing import flagsaver",
        "def count(**flags):",
        "    with flagsaver.flagsaver(**flags):",
        "        return workers.count(4)",
        "print(count(), count(jobs=3), count(jobs=9), count(model='x'), count(mesh='y'))",
        "for number, cores in (2, [0, 3, 5]), (3, [4, 5, 6]), (3, [1, 2]):",
        "    print([workers._part(cores, i, number) for i in range(number)])",
    )
    counts, *parts = said.splitlines()
    every = min(4, len(os.sched_getaffinity(0)))
    assert counts == f"{every} 3 4 1 1"
    assert parts == ["[[0], [3, 5]]", "[[4], [5], [6]]", "[[1], [2], [1]]"]


def test_two_commands_keep_their_claims_apart(python):
    """Catches a command that clears another's claims, and those of a killed one that stay."""
    said = python(
        "import fcntl",
        "folder = workers._claims().parent",
        "for name in ('killed', 'running'):",
        "    (folder / name).mkdir()",
        "    (folder / name / 'parent').touch()",
        "held = (folder / 'running' / 'parent').open()",
        "fcntl.flock(held, fcntl.LOCK_EX)",
        "workers._sweep(folder)",
        "print(sorted(path.name for path in folder.iterdir() if not path.name.isdigit()))",
    )
    assert said == "['running']\n"
