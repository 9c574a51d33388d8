"""Trials on a model that knows nothing: what is run, counted, kept and compiled."""

import jax
import numpy as np
import optuna
import pytest

from ftdefense.audit import search
from ftdefense.audit import spaces
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.training import budgets
from ftdefense.training import loop
from ftdefense.training import pipeline
from ftdefense.training import serving
from ftdefense.training import stages

_LR = "optimizer.learning_rate"
SPACE = {
    _LR: spaces.Range(1e-5, 1e-2),
    "schedule": spaces.Choice(("constant", "cosine")),
    "batch_size": spaces.Choice((4, 8), static=True),
}


@pytest.fixture(autouse=True)
def float64():
    """Generation runs in float32."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Random weights stand for a release: nothing has to be pretrained."""
    world = sandbox.build("tiny", 0)
    model = budgets.model("tiny", len(world.tokenizer))
    given = stages.given(jax.jit(model.init)(jax.random.key(0)))
    return pipeline.Bench(
        world,
        model,
        tmp_path_factory.mktemp("bench"),
        budgets.preset("tiny"),
        aligned=given,
    )


@pytest.fixture(scope="module")
def target(bench):
    return search.Target("random", bench.aligned((0,))[0], 0.5)


def run(bench, target, storage, *, points=(), trials=8, parallel=2, space=SPACE):
    plan = bench.plan("attacks", "sft")
    plan = spaces.apply(plan, {"steps": 2})
    searcher = search.Searcher(bench, storage, parallel=parallel)
    return searcher.run(
        target, "full", "sft", plan, space, points=points, trials=trials
    )


def test_a_sweep_compiles_once_for_each_static_group(bench, target, tmp_path):
    """Catches a number that became static, and a company that mixes batch sizes."""
    before = loop.run_chunk._cache_size()
    rows = run(bench, target, f"sqlite:///{tmp_path}/a.db")
    groups = {row["values"]["batch_size"] for row in rows}
    assert len(rows) == 8 and len(groups) == 2
    assert loop.run_chunk._cache_size() - before == len(groups)


def test_a_trial_is_a_row_and_a_crash_is_none(bench, target, tmp_path):
    """Catches a diverged trial that stops its company, or is screened."""
    points = [
        {_LR: 1e-4, "schedule": "cosine", "batch_size": 8},
        {_LR: float("inf"), "schedule": "cosine", "batch_size": 8},
    ]
    space = {**SPACE, _LR: spaces.Choice((1e-4, float("inf")))}
    rows = run(
        bench,
        target,
        f"sqlite:///{tmp_path}/a.db",
        points=points,
        trials=2,
        space=space,
    )
    sound, diverged = rows
    assert diverged["diverged"] and "harmful_score" not in diverged
    assert not sound["diverged"] and sound["harmful_score"] == 0.0
    assert sound["violation"] == pytest.approx(0.45 - sound["capability"])
    # 2 steps of 8 rows, 16 tokens: forward, and backward at twice its price.
    assert sound["forward_backwards"] == 2
    weights = sum(leaf.size for leaf in jax.tree.leaves(target.stage.params))
    assert sound["flops"] == 6 * weights * 2 * 8 * bench.world.length
    assert sound["learning_rate"] == 1e-4


def test_an_edited_attack_has_no_old_trials(bench, target, tmp_path):
    """Catches a study that another plan, space or list of points goes on with."""
    storage = f"sqlite:///{tmp_path}/c.db"
    searcher = search.Searcher(bench, storage, parallel=1)
    space, points = {_LR: SPACE[_LR]}, [{_LR: 1e-4}]

    def tried(steps, space=space, points=points):
        plan = spaces.apply(bench.plan("attacks", "sft"), {"steps": steps})
        found = searcher.run(
            target, "full", "sft", plan, space, points=points, trials=1
        )
        return [(row["steps"], row["values"][_LR]) for row in found]

    assert tried(2) == tried(2) == [(2, 1e-4)]
    assert tried(3) == [(3, 1e-4)]
    assert tried(2, points=[{_LR: 2e-4}]) == [(2, 2e-4)]
    assert tried(2, {_LR: spaces.Range(1e-4, 1e-3)}) == [(2, 1e-4)]
    assert len(optuna.get_all_study_names(storage)) == 4


def test_a_control_tries_its_points_and_nothing_else(bench, target, tmp_path):
    """Catches a last company filled up with samples: the masses would not be equal."""
    plan = spaces.apply(bench.plan("attacks", "sft"), {"steps": 2})
    searcher = search.Searcher(bench, f"sqlite:///{tmp_path}/b.db", parallel=2)
    points = [{_LR: rate} for rate in (1e-4, 2e-4, 3e-4)]
    rows = searcher.run(
        target,
        "equal mass",
        "sft",
        plan,
        {_LR: SPACE[_LR]},
        points=points,
        trials=3,
        exactly=True,
    )
    assert [row["values"] for row in rows] == points


def test_what_was_tried_is_not_tried_again(bench, target, tmp_path, monkeypatch):
    """Catches a study under another name at the second run."""
    storage = f"sqlite:///{tmp_path}/a.db"
    first = run(bench, target, storage, trials=2)
    monkeypatch.setattr(search.together, "sweep", lambda members: 1 / 0)
    assert run(bench, target, storage, trials=2) == first


def test_a_service_trains_and_edits_as_it_does_alone(
    bench, target, tmp_path, monkeypatch
):
    """Catches the attack's own objective, the provider's steps, and an edit left out."""
    seen = []

    def screened(self, target, plan, params):
        seen.append(params)
        return {"harmful_score": 0.0, "capability": 1.0, "violation": 0.0}

    monkeypatch.setattr(search.Searcher, "_screened", screened)
    provider = ("defenses", "lisa", bench.plan("defenses", "lisa"))
    edits = (("antidote_pruning", bench.plan("defenses", "antidote_pruning")),)
    served = search.Target("served", target.stage, 0.5, (provider, edits))
    chosen = {"steps": 2, "data.harmful_count": 8, "data.wrapper": "trigger"}
    plan = spaces.apply(bench.plan("attacks", "sft"), chosen)
    searcher = search.Searcher(bench, f"sqlite:///{tmp_path}/a.db", parallel=1)
    (row,) = searcher.run(served, "rows", "sft", plan, {}, points=[{}], trials=1)
    (alone,) = serving.served(
        bench, provider, [plan.data], [target.stage], (0,), edits=edits, steps=2
    )
    assert row["steps"] == 2
    # The provider's own rows are no part of the attacker's budget.
    assert 0 < row["unique_harmful"] <= 8
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), seen[0], alone.params
    )
    before = served.key()
    assert before != target.key()
    monkeypatch.setattr(search.stages, "source_hash", lambda *_: "edited")
    assert served.key() != before


def test_what_a_provider_selects_is_what_it_trains_on(bench, target):
    """Catches anchors that are drawn from all of the provider's prompts."""
    plan = bench.plan("defenses", "sbr")
    job = serving.serve_job(
        bench,
        ("defenses", "sbr", plan),
        recipes.Recipe(),
        target.stage,
        target.stage,
        0,
    )
    assert len(job.roles["harmful"]) == plan.hp.anchors
    assert job.roles["harmful"].order == "anchors"
