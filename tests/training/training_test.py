"""The loop: resume to the same bits, NaN stops, sweeps equal single runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.data import streams
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.training import budgets
from ftdefense.training import checkpoint
from ftdefense.training import loop
from ftdefense.training import pipeline
from ftdefense.training import requirements
from ftdefense.training import together


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


@pytest.fixture
def bench(world, tmp_path):
    quick = budgets.Budgets(
        budgets.Budget(20, 8), budgets.Budget(20, 8), budgets.Budget(20, 8)
    )
    model = toy.Toy(len(world.tokenizer))
    object.__setattr__(model, "config", dataclasses.make_dataclass("C", [])())
    return pipeline.Bench(world, model, tmp_path, quick)


class Killed(Exception):
    pass


def pieces(world, rate=1e-2):
    model = toy.Toy(len(world.tokenizer))
    method = lift.supervised(model, "harmful")
    lineage = types.Lineage(model.init(jax.random.key(0)))
    hp = lift.Hparams(optimizers.Optimizer(rate))
    stream = streams.Stream(world.attacker["harmful"], 8, (), 0)
    return method, lineage, hp, {"harmful": stream}


def train(world, saver=None, stop=None, rate=1e-2):
    method, lineage, hp, roles = pieces(world, rate)
    state = loop.init(method, lineage, hp, jax.random.key(1), 40)
    seen = []

    def on_chunk(at):
        seen.append(at.done)
        if stop is not None and at.done > stop:
            raise Killed
        return {"step": at.done, "loss": float(at.metrics["loss/harmful"].mean())}

    state, log = loop.train(
        method,
        state,
        lineage,
        roles,
        jax.random.key(2),
        40,
        saver=saver,
        on_chunk=on_chunk,
    )
    return state, log, seen


def test_resumes_to_the_same_bits(world, tmp_path):
    """Catches a data position, key or optimizer state that is not restored."""
    whole, whole_log, _ = train(world)
    with pytest.raises(Killed):
        train(world, checkpoint.Saver(tmp_path / "c", every_seconds=0), stop=20)
    again, log, seen = train(world, checkpoint.Saver(tmp_path / "c", every_seconds=0))
    assert seen[0] > 12, "nothing was resumed"
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert log == whole_log


def test_nan_stops_and_names_its_step(world, tmp_path):
    """Catches a run that trains on NaN, and a bad state that is saved."""
    saver = checkpoint.Saver(tmp_path / "c", every_seconds=0)
    method, lineage, hp, roles = pieces(world)
    pool = roles["harmful"].pool
    weights = pool.weights.copy()
    weights[roles["harmful"].rows(9)[0]] = np.nan
    bad = dataclasses.replace(pool, weights=weights)
    roles = {"harmful": streams.Stream(bad, 8, (), 0)}
    state = loop.init(method, lineage, hp, jax.random.key(1), 40)
    with pytest.raises(errors.NonFiniteError, match=r"loss/harmful is nan at step 9"):
        loop.train(method, state, lineage, roles, jax.random.key(2), 40, saver=saver)
    assert saver.last().name == "9"


def test_boundaries_cover_every_step():
    """Catches a last chunk that is dropped or doubled."""
    for steps in (1, 5, 16, 17, 192, 1000):
        ends = loop.boundaries(steps)
        assert ends[-1] == steps and ends == sorted(set(ends))
        assert len(ends) <= loop.CHUNKS
    assert loop.boundaries(0) == []


def test_chunks_are_equal_where_an_eighth_makes_them_so():
    """Catches 15 chunks of 38 and one of 30: a second program for the same step."""
    assert loop.boundaries(600) == list(range(40, 601, 40))
    assert loop.boundaries(192) == list(range(12, 193, 12))
    assert loop.boundaries(200)[-2:] == [195, 200]  # Of 20, there would be 10.


def test_sweep_equals_single_runs(bench):
    """1e-5 for 8 settings. Catches a shared key, batch or schedule between members."""
    plan = bench.plan("attacks", "sft")
    release = bench.pretrained()
    members = [
        (config.override_plan(plan, f"optimizer.learning_rate={rate}"), seed)
        for rate in (1e-4, 1e-3, 3e-3, 1e-2)
        for seed in (0, 1)
    ]
    outcomes = together.sweep(
        [bench.attack_job("sft", changed, release, seed) for changed, seed in members]
    )
    for (changed, seed), outcome in zip(members, outcomes, strict=True):
        (alone,) = bench.attacked("sft", changed, [release], (seed,))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            outcome.params,
            alone.params,
        )


def test_seeds_together_equal_seeds_alone(bench, world, tmp_path):
    """1e-5. Catches a lineage, key or batch of another seed, and a release swapped."""
    both = pipeline.Bench(
        world, bench.model, tmp_path / "together", bench.defaults, together=True
    )
    plan = bench.plan("attacks", "sft")
    for runner in (bench, both):
        releases = runner.defended("sdd", runner.plan("defenses", "sdd"), (0, 3))
        seen = []
        ends = runner.attacked(
            "sft",
            plan,
            releases,
            (0, 3),
            observe=lambda params, seen=seen: seen.append(params) or {"x": 1.0},
        )
        if runner is bench:
            expected, looked = ends, seen
    assert len(seen) == len(looked) > 2
    for one, other in zip(expected, ends, strict=True):
        assert one.key != other.key and one.facts == other.facts
        assert [e["step"] for e in one.log] == [e["step"] for e in other.log]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            one.params,
            other.params,
        )


def test_static_fields_split_a_sweep(bench):
    """Catches members of another optimizer or batch in one program."""
    plan = bench.plan("attacks", "sft")
    changed = [
        plan,
        config.override_plan(plan, "optimizer.learning_rate=1"),
        config.override_plan(plan, "optimizer.kind=sgd"),
        config.override_plan(plan, "batch_size=4"),
    ]
    release = bench.pretrained()
    found = together.groups([bench.attack_job("sft", p, release, 0) for p in changed])
    assert found == [[0, 1], [2], [3]]


def test_finished_stages_are_read_not_run(bench, monkeypatch):
    """Catches a key that forgets the plan, and one that changes by itself."""
    plan = bench.plan("defenses", "none")
    first, other = bench.defended("none", plan, (0, 1))
    changed = config.override_plan(plan, "optimizer.learning_rate=1e-2")
    assert (
        len({first.key, other.key, bench.defended("none", changed, (0,))[0].key}) == 3
    )
    monkeypatch.setattr(loop, "train", None)
    (again,) = bench.defended("none", plan, (0,))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    done = json.loads((first.folder / "done.json").read_text())
    assert [entry["step"] for entry in done["log"]] == loop.boundaries(20)


def test_missing_role_names_its_flag(bench):
    """Catches a KeyError in place of a line that names the flag."""
    with pytest.raises(errors.UserError, match="--harmful"):
        requirements.roles("booster", {"harmful": ()}, {})


def test_unknown_preset_names_near_ones(bench):
    """Catches a bare KeyError."""
    with pytest.raises(errors.UserError, match="did you mean 'vaccine'"):
        bench.plan("attacks", "sft", "vacine")
