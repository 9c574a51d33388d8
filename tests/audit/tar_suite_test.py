"""TAR's suite: how many cells, what varies among them, and that each can be run."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit import tar_suite
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.methods import adapters
from ftdefense.models import toy
from ftdefense.training import loop

SUITE = tar_suite.scaled()
MODEL = toy.Toy()


def counted(of):
    return dict(Counter(of(cell) for cell in SUITE))


def test_there_are_28():
    """Catches a cell that is lost, or there twice under another number."""
    assert [cell.number for cell in SUITE] == [*range(1, 29)]
    assert len({cell.name for cell in SUITE}) == 28
    assert len({str(cell.plan) + cell.attack for cell in SUITE}) == 28


def test_counts_per_axis():
    """The table of B.3. Catches an axis with a value too many."""
    assert counted(lambda c: c.attack) == {"sft": 23, "relearn_switch": 5}
    assert counted(lambda c: c.plan.data.poison_ratio) == {1.0: 25, 0.5: 2, 0.0: 1}
    assert counted(lambda c: c.plan.hp.optimizer.kind) == {
        "adamw": 20,
        "adam": 1,
        "sgd": 2,
        "adagrad": 1,
        "adadelta": 3,
        "adamw_sf": 1,
    }
    assert sum(c.plan.hp.optimizer.nesterov for c in SUITE) == 1
    assert counted(lambda c: c.plan.hp.optimizer.schedule.decay) == {
        "constant": 26,
        "cosine": 1,
        "restarts": 1,
    }
    assert counted(lambda c: c.plan.batch_size) == {64: 26, 32: 1, 16: 1}
    assert counted(lambda c: c.plan.steps) == {1000: 26, 2000: 2}
    lora = [c.number for c in SUITE if isinstance(c.plan.hp.adapter, adapters.LoRA)]
    assert lora == [25, 26, 27, 28]
    switches = [c for c in SUITE if c.attack == "relearn_switch"]
    assert [(c.plan.hp.selection, c.plan.hp.share) for c in switches] == [
        ("block", 0.4),
        ("block", 0.4),
        ("coin", 0.5),
        ("coin", 0.5),
        ("block", 0.4),
    ]


def test_rates_of_each_optimizer():
    """Catches SGD at AdamW's rate, and AdamW's numbers in Adadelta."""
    rates = {
        kind: sorted(
            {
                c.plan.hp.optimizer.learning_rate
                for c in SUITE
                if c.plan.hp.optimizer.kind == kind
            }
        )
        for kind in ("adamw", "sgd", "adadelta", "adagrad", "adam", "adamw_sf")
    }
    assert rates == {
        "adamw": [2e-6, 2e-5, 4e-5, 1e-4],
        "sgd": [1e-3],
        "adadelta": [1.0],
        "adagrad": [2e-5],
        "adam": [2e-5],
        "adamw_sf": [2e-5],
    }
    adadelta = next(c for c in SUITE if c.plan.hp.optimizer.kind == "adadelta")
    assert adadelta.plan.hp.optimizer.b2 == 0.9


@pytest.mark.parametrize("steps", [1000, 200])
def test_schedules_keep_their_shape(steps):
    """Catches warm-ups in steps of another run, and a floor relative to nothing."""
    suite = {cell.number: cell.plan for cell in tar_suite.scaled(steps, 32, 5.0)}
    for number, warmup in ((4, 0.03), (5, 0.1), (16, 0.015)):
        plan = suite[number]
        table = np.asarray(plan.hp.optimizer.schedule.table(plan.steps))
        assert np.argmax(table) == round(warmup * plan.steps), number
    cosine, restarts = (suite[n].hp.optimizer for n in (6, 7))
    table = cosine.learning_rate * np.asarray(cosine.schedule.table(steps))
    assert table[round(0.03 * steps) :].min() >= 5 * 1.780e-5
    table = np.asarray(restarts.schedule.table(steps))
    peaks = np.flatnonzero(table == 1)
    start, cycle = round(0.03 * steps), round(0.1 * steps)
    np.testing.assert_array_equal(peaks, np.arange(start, steps + 1, cycle))
    assert table[start:].min() == pytest.approx(0.25, abs=0.02)
    assert (suite[14].batch_size, suite[15].batch_size) == (8, 16)


def test_each_cell_has_its_rows_and_starts():
    """Catches an attack, a kind or a recipe that does not exist."""
    world = sandbox.build("tiny", 0)
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    narrow = {"targets": ("up", "down")}  # What the toy has.
    for cell in SUITE:
        roles = recipes.attacker_pools(world, cell.plan.data)
        hp = cell.plan.hp
        if isinstance(hp.adapter, adapters.LoRA):
            hp = hp.replace(adapter=hp.adapter.replace(**narrow))
        method = registry.method("attacks", cell.attack, MODEL)
        assert set(method.streams(hp)) <= set(roles), cell.name
        hp = jax.tree.map(jnp.asarray, loop.tabulate(hp, cell.plan.steps))
        lineage = types.Lineage(params)
        jax.eval_shape(method.init, lineage, hp, jax.random.key(0))
