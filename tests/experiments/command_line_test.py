"""The scripts as a stranger types them: one line for every mistake."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--defense=boster"], ["unknown defense 'boster'", "did you mean 'booster'"]),
        (["--attack=sft:vacine"], ["unknown preset", "'vaccine'"]),
        (["--set=defense.alfa=1"], ["unknown field 'alfa'"]),
        (["--set=booster.alfa=1"], ["unknown field 'alfa'", "'alpha'"]),
        (["--set=booster.alpha=much"], ["alpha is a number", "'much'"]),
        (["--defense=sbr", "--set=sbr.anchors=0"], ["set defense.anchors"]),
        (["--set=booster.microbatches=1.5"], ["microbatches is a whole number"]),
        (["--set=sidestepper.lam=2", "--attack=sft"], ["not in this run", "sft"]),
        (["--set=attack.stepz=2"], ["'stepz'", "did you mean 'steps'"]),
        (["--preset=smal"], ["unknown preset", "'small'"]),
        (["--seeds=one"], ["--seeds=one", "whole numbers"]),
        (["--seeds=0,-1"], ["--seeds=0,-1", "whole numbers"]),
        (["--seeds="], ["--seeds=", "whole numbers"]),
        (["--benign=x.jsonl"], ["--benign goes with --model"]),
        (["--wrappers=prefil"], ["unknown wrapper 'prefil'", "'prefill'"]),
        (["--model=nowhere"], ["--model needs --harmful"]),
        (["--model=nowhere", "--harmful=x", "--benign="], ["needs --benign"]),
        (["--model=nowhere", "--harmful=x", "--benign=x"], ["no such folder"]),
        (["--nosuchflag"], ["nosuchflag"]),
        (
            ["--defense=lisa", "--attack=abliteration"],
            ["abliteration is not made", "--threat"],
        ),
        (
            ["--defense=none", "--threat=service", "--attack=benign_dpo"],
            ["benign_dpo is not made", "--threat=open_weight"],
        ),
    ],
)
def test_mistakes_are_one_line(call, tmp_path, arguments, words):
    """Catches a traceback, a status of 0, and a work directory that is left behind."""
    mistake(call, tmp_path, "run.py", arguments, words)


def mistake(call, tmp_path, script, arguments, words):
    # The smaller sandbox, unless a preset is the mistake: it is built in less time.
    done = call(script, f"--workdir={tmp_path / 'w'}", "--preset=tiny", *arguments)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--defense=lisa", "--families=kick-settle"], ["family 'kick-settle'"]),
        (["--defense=lisa", "--attack=quantise"], ["only rows and steps", "run.py"]),
        (["--defense=lisa", "--template=T2"], ["--template", "leave it out"]),
        (["--checkpoint=nowhere"], ["nowhere/config.json not found"]),
        (["--defense=booster", "--set=attack.steps=3"], ["sets its attacks itself"]),
        (["--defense=booster", "--template=T9"], ["--template=T9", "T1, T2"]),
        (["--defense=booster", "--reference=x"], ["--reference goes with"]),
        (["--defense=booster", "--storage=no://x"], ["--storage=no://x", "sqlite"]),
    ],
)
def test_mistakes_of_an_audit_are_one_line(call, tmp_path, arguments, words):
    """Catches a work directory that is claimed before the request is understood."""
    mistake(call, tmp_path, "audit.py", arguments, words)


@pytest.mark.parametrize(
    ("defense", "precision", "warned"),
    [
        ("vaccine,booster", "bfloat16", True),
        ("vaccine", "bfloat16", False),
        ("booster", "float32", False),
    ],
)
def test_rounding_is_warned_of(call, tmp_path, defense, precision, warned):
    """Catches a look-ahead that bfloat16 rounds away unnoticed, and a cry of wolf."""
    mistake = "--set=sft.alfa=1"  # Found after it, before anything trains.
    done = call(
        "run.py",
        f"--workdir={tmp_path / 'w'}",
        "--preset=tiny",
        f"--defense={defense}",
        f"--compute_dtype={precision}",
        "--attack=sft",
        mistake,
    )
    *warnings, error = done.stderr.strip().splitlines()
    assert error.startswith("error: "), done.stderr
    assert [line.split()[:2] for line in warnings] == (
        [["warning:", "booster:"]] if warned else []
    )


def test_a_folder_that_cannot_be_written_is_one_line(call, tmp_path):
    """Catches a traceback where a file stands in the way."""
    (tmp_path / "file").write_text("")
    done = call("run.py", f"--workdir={tmp_path / 'file' / 'w'}", "--preset=tiny")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --workdir=") and "choose another" in line


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ENOSPC", "/x/w: No space left on device; free some space"),
        ("EACCES", "/x/w: Permission denied; check its permissions."),
    ],
)
def test_what_the_disk_refuses_is_one_line(call, tmp_path, code, words):
    """Catches a traceback in the middle of a long run, and a status of 0."""
    script = tmp_path / "lines.py"
    script.write_text(
        f"import errno, os, sys\nsys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "import settings\n"
        f"def main(): raise OSError(errno.{code}, os.strerror(errno.{code}), '/x/w')\n"
        "settings.run(main)\n"
    )
    done = call(script)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


def test_workdir_of_another_configuration_is_kept(call, tmp_path):
    """Catches results of two configurations in one folder."""
    (tmp_path / "config.json").write_text(json.dumps({"seeds": [7]}))
    done = call("run.py", f"--workdir={tmp_path}", "--preset=tiny")
    assert done.returncode == 2
    assert "holds another configuration" in done.stderr
    assert json.loads((tmp_path / "config.json").read_text()) == {"seeds": [7]}
    assert len(list(tmp_path.iterdir())) == 1


def test_audits_are_compared_at_the_cost_of_the_cheapest(call, tmp_path):
    """Catches an ensemble that is credited with what it found beyond the other's budget."""
    for name, scores in ("ensemble", [0.2, 0.4, 0.9]), ("sweep", [0.3, 0.3]):
        rows = [
            {"target": name, "family": "full", "harmful_score": score, "violation": 0.0}
            | {"steps": 5, "flops": 1.0, "forward_backwards": 5}
            for score in scores
        ]
        (tmp_path / name).mkdir()
        lines = [json.dumps(row) for row in [*rows, {**rows[0], "target": "none"}]]
        (tmp_path / name / "trials.jsonl").write_text("\n".join(lines) + "\n")
        best = {"harmful_score": max(scores), "family": "full"}
        verdict = {"subject": name, "verdict": "BROKEN", "flags": ["E2"]}
        verdict["useful_worst_case"] = best
        (tmp_path / name / "verdict.json").write_text(json.dumps(verdict))
    folders = [tmp_path / "ensemble", tmp_path / "sweep"]
    done = call("audits.py", f"--audits={folders[0]},{folders[1]}")
    assert done.returncode == 0, done.stderr
    header, _, first, second = done.stdout.splitlines()
    assert "at 10 passes" in header
    assert first.split()[1:7] == ["ensemble", "3", "15", "0.90", "full", "0.40"]
    assert second.split()[1:7] == ["sweep", "2", "10", "0.30", "full", "0.30"]
    missing = call("audits.py", f"--audits={tmp_path}")
    assert missing.returncode == 2 and "run audit.py" in missing.stderr


def test_matmul_precision(tmp_path):
    """Catches TensorFloat-32 on a GPU by default, and a flag that nothing reads."""
    lines = (
        "import jax, settings, sys",
        "settings.FLAGS(sys.argv)",
        "for settings.FLAGS.matmul_precision in ('highest', 'default'):",
        "    assert settings.FLAGS['matmul_precision'].default == 'highest'",
        "    settings.bench()",
        "    print(jax.config.jax_default_matmul_precision)",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), "--preset=tiny"]
        + [f"--workdir={tmp_path / 'w'}"],
        capture_output=True,
        text=True,
        cwd=ROOT / "experiments",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.split() == ["highest", "None"], done.stderr


def test_help_names_every_flag():
    """Catches a flag without a description, and a script that starts in a fork alone."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "run.py"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    for flag in ("--defense", "--attack", "--model", "--preset", "--seeds", "--set"):
        assert flag.replace("--", "") in done.stdout
