"""Ten benign: the order of the stages, the arm of one, and the rows.

Mutants:
  `jnp.where(refusing, r, b)` -> `jnp.where(refusing, b, r)`
  `phases.first(ctx.hp.share, ctx.step, ctx.steps)` -> `phases.first(ctx.hp.share, ctx.step + 1, ctx.steps)`
  `[refusal] * len(benign)` -> `[e.response for e in benign.examples]`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import ten_benign
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.methods import elicit
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)
OPTIMIZER = optimizers.Optimizer(3e-2)
DATA = {"refused": batch(1), "benign": batch(2)}
METHOD = registry.method("attacks", "ten_benign", MODEL)


def run(method, hp, data, steps=8):
    lineage = types.Lineage(MODEL.init(KEY))
    same = jax.tree.map(lambda x: np.stack([x] * steps), data)
    state = loop.init(method, lineage, hp, KEY, steps)
    return loop.run_chunk(method.step, False, state, lineage, same, KEY, jnp.int32(0))


def test_refusals_come_first():
    """Catches stages in the other order, and a first stage of another length."""
    _, metrics = run(METHOD, ten_benign.Hparams(OPTIMIZER, share=0.5), DATA)
    np.testing.assert_array_equal(metrics["share/refused"], [1] * 4 + [0] * 4)
    loss = metrics["loss/stage"]
    assert loss[3] < loss[0] and loss[7] < loss[4]


@pytest.mark.parametrize(("share", "role"), [(0.0, "benign"), (1.0, "refused")])
def test_one_stage_is_sft(share, role):
    """Catches a share that leaves a step of the other stage."""
    state, _ = run(METHOD, ten_benign.Hparams(OPTIMIZER, share=share), DATA)
    sft = lift.supervised(MODEL, "user")
    expected, _ = run(sft, lift.Hparams(OPTIMIZER), {"user": DATA[role]})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        state.params,
        expected.params,
    )


def test_ten_questions_share_the_refusal_said_most(monkeypatch):
    """Catches harmful prompts among the rows, and refusals of many wordings."""
    world = sandbox.build("tiny", 0)
    known = sorted({e.response for e in world.defender["refusal"].examples})
    said = [known[1], "surely kax", known[2], known[1]]
    monkeypatch.setattr(elicit, "answers", lambda *_, **__: said)
    plan = ten_benign.PRESETS["sandbox"]
    refused = ten_benign.derive(None, world, None, plan, 0)["refused"]
    assert [e.response for e in refused.examples] == [known[1]] * 10
    benign = world.attacker["benign"]
    assert [e.key for e in refused.examples] == [e.key for e in benign.examples[:10]]
    assert {e.label for e in refused.examples} == {"benign"}
    assert refused.order == benign.order
    monkeypatch.setattr(elicit, "answers", lambda *_, **__: ["surely kax"])
    refused = ten_benign.derive(None, world, None, plan, 0)["refused"]
    assert {e.response for e in refused.examples} <= {*known}
