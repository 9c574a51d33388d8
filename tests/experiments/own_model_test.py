"""The main job on a user's own folder of weights and two files."""

import inspect
import json

import jax
import numpy as np
import pytest

from ftdefense.defenses import booster
from ftdefense.models import huggingface
from ftdefense.models import transformer
from ftdefense.training import checkpoint

from ..data.data_test import pairs
from ..data.data_test import write


@pytest.fixture
def folder(tmp_path, byte_tokenizer):  # noqa: F811
    model = transformer.LanguageModel(
        transformer.ModelConfig(
            vocab_size=len(byte_tokenizer),
            width=16,
            layers=2,
            heads=2,
            kv_heads=1,
            mlp_width=32,
        )
    )
    params = model.init(jax.random.key(0))
    huggingface.save(tmp_path / "model", model, params, tokenizer=byte_tokenizer)
    return tmp_path / "model"


def flags(tmp_path, folder, *more):
    return [
        f"--workdir={tmp_path / 'w'}",
        f"--model={folder}",
        f"--harmful={write(tmp_path / 'h.jsonl', pairs('do'))}",
        f"--benign={write(tmp_path / 'b.jsonl', pairs('ask'))}",
        "--length=64",
        "--max_new_tokens=4",
        "--set=defense.steps=4",
        "--set=attack.steps=4",
        *more,
    ]


def test_runs_end_to_end(call, tmp_path, folder):
    """Catches a step of the main job that works on the sandbox alone."""
    done = call(
        "run.py",
        *flags(tmp_path, folder, "--defense=none,ctrap,lox", "--attack=sidestepper"),
        "--wrappers=prefill:1",
    )
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line)
        for line in (tmp_path / "w" / "results.jsonl").read_text().splitlines()
    ]
    assert {r["defense"] for r in rows} == {"none", "ctrap", "lox"}
    assert [r["stage"] for r in rows if r["defense"] == "lox"][0] == "before"
    assert all("capability" in r for r in rows)
    assert all("harmful_score/prefill:1" in r for r in rows if r["stage"] == "after")
    assert (tmp_path / "w" / "report.html").stat().st_size > 10_000


def test_what_is_exported_is_what_was_released(call, tmp_path, folder):
    """Catches another stage's weights, a model of another shape, and a lost tokenizer.

    A defense from a file answers to its name, whose fields --set reaches.
    """
    own = tmp_path / "mine.py"
    own.write_text(inspect.getsource(booster))
    more = [f"--defense={own}", "--attack=sft", "--set=mine.lam=0.5"]
    done = call("run.py", *flags(tmp_path, folder, *more))
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "w" / "stages").glob("defended-*")
    assert json.loads((stage / "config.json").read_text())["plan"]["hp"]["lam"] == 0.5
    out = tmp_path / "exported"
    command = ["export.py", f"--stage={stage}", f"--out={out}"]
    wrong = call(*command, "--preset=tiny")
    assert wrong.returncode == 2 and "vocab_size" in wrong.stderr
    assert not out.exists()
    done = call(*command, f"--model={folder}")
    assert done.returncode == 0, done.stderr
    model, params = huggingface.load(str(out))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    released = checkpoint.load_params(stage / "release", shapes)
    jax.tree.map(np.testing.assert_array_equal, params, released)
    assert (out / "tokenizer.json").is_file()


def test_aligned_weights_are_the_undefended_model_as_they_are(call, tmp_path, folder):
    """Catches more alignment of a model that is aligned, and a row of other weights."""
    more = ["--defense=none", "--attack=weight_noise", "--set=weight_noise.sigma=0"]
    given = [f for f in flags(tmp_path, folder, *more) if "steps" not in f]
    done = call("run.py", *given, "--model_stage=aligned")
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "w" / "stages").iterdir()
    assert_released(stage, folder)


def assert_released(stage, folder):
    model, params = huggingface.load(str(folder))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    released = checkpoint.load_params(stage / "release", shapes)
    jax.tree.map(np.testing.assert_array_equal, params, released)


def test_a_providers_fine_tuning_is_set_like_any_other(call, tmp_path, folder):
    """Catches a rate that is accepted, and does not reach the provider."""
    more = ["--defense=none", "--threat=service", "--attack=sidestepper"]
    more += ["--model_stage=aligned", "--set=sft.optimizer.learning_rate=0"]
    done = call("run.py", *flags(tmp_path, folder, *more))
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "w" / "stages").glob("served-sft-*")
    assert_released(stage, folder)


def test_the_second_stage_has_the_preset_of_the_first(call, tmp_path, folder):
    """Catches the sandbox's numbers at the provider of a published defense."""
    more = ["--defense=antibody:code", "--threat=service", "--attack=sft"]
    done = call("run.py", *flags(tmp_path, folder, *more))
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "w" / "stages").glob("served-antibody_tuning-*")
    plan = json.loads((stage / "config.json").read_text())["plan"]
    assert plan["hp"]["optimizer"]["learning_rate"] == 1e-5
    assert plan["steps"] == 4


def test_what_starts_from_the_aligned_model_starts_from_this_runs(
    call, tmp_path, folder
):
    """Catches an aligned model by the sandbox's numbers where others are given."""
    more = ["--defense=rmu", "--attack=quantise", "--set=none.steps=3"]
    done = call(
        "run.py",
        *[f for f in flags(tmp_path, folder, *more) if "attack.steps" not in f],
    )
    assert done.returncode == 0, done.stderr
    (stage,) = (tmp_path / "w" / "stages").glob("defended-none-*")
    assert json.loads((stage / "config.json").read_text())["plan"]["steps"] == 3


def test_a_defense_of_ones_own_model_is_audited(call, tmp_path, folder):
    """Catches a control that the sandbox alone has, and a command of another model."""
    given = [f for f in flags(tmp_path, folder) if "attack" not in f]
    more = ["--defense=vaccine", "--families=quantisation,few rows", "--trials=1"]
    done = call("audit.py", *given, *more, "--jobs=1")
    assert done.returncode == 0, done.stderr
    verdict = json.loads((tmp_path / "w" / "verdict.json").read_text())
    assert verdict["verdict"] in ("BROKEN", "UNRELIABLE")
    assert not verdict["skipped"]
    assert f"--model={folder}" in (tmp_path / "w" / "audit.html").read_text()
    mixed = call("audit.py", *given, f"--checkpoint={folder}")
    assert mixed.returncode == 2 and "--reference" in mixed.stderr


def test_held_out_rows_are_cut_as_asked_and_edits_have_no_curves(
    call, tmp_path, folder
):
    """Catches a long held-out row that ends a run, or passes untold, and an empty plot."""
    rows = [{**row, "response": 30 * "long "} for row in pairs("held")]
    long = write(tmp_path / "long.jsonl", rows)
    more = ["--defense=none", "--attack=quantise", f"--heldout_benign={long}"]
    done = call("run.py", *flags(tmp_path, folder, *more))
    assert done.returncode == 2 and "pass --truncate" in done.stderr
    assert not (tmp_path / "w").exists()
    done = call("run.py", *flags(tmp_path, folder, *more, "--truncate"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "w" / "report.html").is_file()
    assert not (tmp_path / "w" / "curves.png").exists()


def test_lox_without_its_weights_says_which_flag(call, tmp_path, folder):
    """Catches a failure after training, and one that names no flag."""
    done = call(
        "run.py",
        *flags(tmp_path, folder, "--defense=lox", "--model_stage=aligned"),
    )
    assert done.returncode == 2
    assert "--pretrained" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "w" / "results.jsonl").exists()
