"""The main job on a user's own folder of weights and two files."""

import json

import jax
import pytest

from ftdefense.models import huggingface
from ftdefense.models import transformer

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


def test_lox_without_its_weights_says_which_flag(call, tmp_path, folder):
    """Catches a failure after training, and one that names no flag."""
    done = call(
        "run.py",
        *flags(tmp_path, folder, "--defense=lox", "--model_stage=aligned"),
    )
    assert done.returncode == 2
    assert "--pretrained" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "w" / "results.jsonl").exists()
