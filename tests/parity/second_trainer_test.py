"""The undefended model fine-tuned by two trainers: ours, and PyTorch with transformers.

specs/attacks.md B.4: they must agree, or one of them is wrong. All that a run is made of
is in it: loss, mask, order of the rows, clipping, optimizer, schedule, weights read and
written.
"""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.methods import elicit
from ftdefense.methods import optimizers
from ftdefense.methods import schedules
from ftdefense.models import huggingface
from ftdefense.training import budgets
from ftdefense.training import pipeline
from ftdefense.training import stages
from ftdefense.training import together

STEPS, WARMUP, BATCH, RATE, DECAY = 80, 8, 16, 3e-3, 0.1


@pytest.fixture(autouse=True)
def float64():
    """Both train in float32, as a run does."""


def theirs(folder, job):
    """PyTorch's AdamW on transformers' model, its own loss, its own schedule."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    plain = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    stream = job.streams()["user"]
    for step in range(STEPS):
        batch = stream.batch(step)
        tokens = torch.tensor(batch.tokens, dtype=torch.long)
        asked = torch.tensor(batch.weights) > 0
        labels = tokens.masked_fill(~asked, -100)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def test_two_trainers_agree(tmp_path):
    """Catches a rate that is one step late, a mask that is one token off, a decay of
    norms, and a mean over rows where tokens are meant.
    """
    world = sandbox.build("tiny", 0)
    model = budgets.model("tiny", len(world.tokenizer))
    params = jax.jit(model.init)(jax.random.key(0))
    bench = pipeline.Bench(
        world,
        model,
        tmp_path / "bench",
        budgets.preset("tiny"),
        aligned=stages.given(params),
    )
    plan = bench.plan("attacks", "sft")
    schedule = schedules.Schedule(warmup_ratio=WARMUP / STEPS, decay="cosine")
    optimizer = optimizers.Optimizer(RATE, schedule, weight_decay=DECAY)
    plan = dataclasses.replace(
        plan,
        hp=plan.hp.replace(optimizer=optimizer),
        steps=STEPS,
        batch_size=BATCH,
        data=recipes.Recipe(sample_count=24),
    )
    job = bench.attack_job("sft", plan, *bench.aligned((0,)), 0)
    (ours,) = together.sweep([job])
    huggingface.save(tmp_path / "start", model, params)
    them = theirs(tmp_path / "start", job)
    them.save_pretrained(tmp_path / "end")
    _, weights = huggingface.load(str(tmp_path / "end"))
    # Rounding left 2e-6 when this was written.
    moved = tree.add_scale(ours.params, -1.0, params)
    apart = tree.add_scale(ours.params, -1.0, weights)
    assert tree.norm(apart) <= 1e-4 * tree.norm(moved)
    rows = job.roles["user"].examples
    said = [elicit.answers(model, world, w, rows) for w in (ours.params, weights)]
    right = [
        np.mean([text == e.response for text, e in zip(texts, rows, strict=True)])
        for texts in said
    ]
    assert min(right) >= 0.9 and abs(right[0] - right[1]) <= 0.05
