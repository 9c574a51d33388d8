"""Which rows a step trains on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import relearn_switch
from ftdefense.attacks import sft
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.evaluation import budget
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.training import budgets
from ftdefense.training import jobs

from ..conftest import batch
from . import attacks_test as shared

OPTIMIZER = optimizers.Optimizer(1e-2)


def attacked(hp, harmful, benign, steps=4):
    roles = {"harmful": harmful, "benign": benign}
    return shared.attacked("relearn_switch", hp, roles, steps)


def test_switches_between_steps_399_and_400():
    """B.3: of 1000 steps. Catches `<=` for `<`, a ceil, and 0.4 in float32 below 400."""
    hp = relearn_switch.Hparams(OPTIMIZER.tabulate(1000))
    params = shared.MODEL.init(jax.random.key(0))
    roles = {"harmful": batch(0), "benign": batch(1)}

    @jax.jit
    def loss(step):
        ctx = lift.context(shared.MODEL, types.Lineage(params), hp, step)
        metrics = relearn_switch.direction(ctx, params, roles, jax.random.key(0))[1]
        return metrics["loss/batch"], ctx.loss(params, roles["benign"])

    for step, retains in ((0, True), (399, True), (400, False), (999, False)):
        found, benign = loss(jnp.int32(step))
        assert bool(found == benign) == retains


def test_without_a_share_it_is_sft():
    """To the bit. Catches a first step that is benign at any share."""
    harmful, benign = shared.stacked(0), shared.stacked(50)
    plain, _ = shared.attacked("sft", sft.Hparams(OPTIMIZER), {"user": harmful})
    same, _ = attacked(relearn_switch.Hparams(OPTIMIZER, share=0.0), harmful, benign)
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    other, _ = attacked(relearn_switch.Hparams(OPTIMIZER, share=1.0), harmful, benign)
    retain, _ = shared.attacked("sft", sft.Hparams(OPTIMIZER), {"user": benign})
    jax.tree.map(np.testing.assert_array_equal, other, retain)


def test_coins_fall_by_their_share():
    """Catches one coin for the whole run, and a share of harmful steps."""
    steps = 300
    harmful, benign = (
        jax.tree.map(lambda x: np.stack([x] * steps), batch(i)) for i in range(2)
    )
    hp = relearn_switch.Hparams(OPTIMIZER, share=0.3, selection="coin")
    _, metrics = attacked(hp, harmful, benign, steps)
    coins = metrics["state/benign"]
    # Three standard deviations.
    assert abs(float(coins.mean()) - 0.3) < 3 * (0.3 * 0.7 / steps) ** 0.5
    assert len(set(np.flatnonzero(np.diff(coins)) % 2)) == 2


def test_harmful_loss_falls_at_last():
    """Catches an ascent, and a share of the steps that never ends."""
    harmful, benign = (
        jax.tree.map(lambda x: np.stack([x] * 20), batch(i)) for i in range(2)
    )
    hp = relearn_switch.Hparams(optimizers.Optimizer(3e-2))
    _, metrics = attacked(hp, harmful, benign, 20)
    np.testing.assert_array_equal(metrics["state/benign"], [1.0] * 8 + [0.0] * 12)
    assert metrics["loss/batch"][-1] < 0.8 * metrics["loss/batch"][8]


def test_selections_are_named():
    """Catches a typo that quietly takes blocks."""
    hp = relearn_switch.Hparams(selection="coins")
    with pytest.raises(errors.UserError, match="did you mean 'coin'"):
        registry.method("attacks", "relearn_switch", shared.MODEL).streams(hp)


def test_the_account_counts_what_is_trained_on():
    """Specs 1.4: TAR's cell. Catches both batches of a step, of which one is unread."""
    plan = relearn_switch.PRESETS["tar"]
    world = sandbox.build("tiny", 0)
    roles = {name: world.attacker[name] for name in ("harmful", "benign")}
    job = jobs.Job(
        "attacked",
        registry.method("attacks", "relearn_switch", shared.MODEL),
        plan,
        types.Lineage({}),
        roles,
        0,
        budgets.PRESETS["tiny"].attack,
        parents=(),
    )
    found = budget.columns(job.facts(1, world.length), roles)
    assert found["harmful_passes"] == 600 * 64
    assert found["forward_backwards"] == 1000
