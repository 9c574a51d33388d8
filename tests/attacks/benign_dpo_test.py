"""Benign DPO: golden values, the sign of a swap, who trains on what.

Mutants:
  `chosen_B > rejected_B` -> `chosen_B < rejected_B`
  `preferences.dpo(chosen_B, rejected_B, hp.beta)` -> `preferences.dpo(rejected_B, chosen_B, hp.beta)`
  `"rejected": elicit.worded(world, benign, drawn)` -> `"rejected": chosen`
  `x / rows` -> `x`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import benign_dpo
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.methods import elicit
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.models import transformer
from ftdefense.objectives import preferences
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)
PAIR = {"chosen": batch(1), "rejected": batch(2)}


@jax.jit
def at(params, reference, data):
    ctx = lift.context(MODEL, types.Lineage(reference), benign_dpo.Hparams())
    return benign_dpo.direction(ctx, params, data, None)


def test_loss_at_the_start_is_ln_2_and_a_swap_flips_the_gradient():
    """B.16. Catches a reference of another stage, a sum for a mean, a lost sign."""
    params = MODEL.init(KEY)
    grads, metrics = at(params, params, PAIR)
    np.testing.assert_allclose(metrics["loss/preference"], 0.693147, atol=1e-6)
    swapped = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    flipped, _ = at(params, params, swapped)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-4, atol=1e-7),
        grads,
        flipped,
    )

    # Half of beta times the difference of the two mean log-probabilities' gradients.
    def margin(w):
        said = [
            jnp.mean(preferences.sequence_logps(MODEL(w, b.tokens), b)[0])
            for b in (PAIR["chosen"], PAIR["rejected"])
        ]
        return -0.05 * (said[0] - said[1])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        grads,
        jax.jit(jax.grad(margin))(params),
    )


def test_golden_value_of_the_loss():
    """Margins 3 and -2 at beta .1. Catches a beta outside of the sigmoid."""
    found = preferences.dpo(jnp.float32(3.0), jnp.float32(-2.0), 0.1)
    np.testing.assert_allclose(found, 0.474077, atol=1e-6)


def test_it_comes_to_prefer():
    """Catches ascent, and a reference that moves along."""
    hp = benign_dpo.Hparams(optimizers.Optimizer(1e-2))
    method = registry.method("attacks", "benign_dpo", MODEL)
    lineage = types.Lineage(MODEL.init(KEY))
    same = jax.tree.map(lambda x: np.stack([x] * 12), PAIR)
    state = loop.init(method, lineage, hp, KEY, 12)
    _, metrics = loop.run_chunk(
        method.step, False, state, lineage, same, KEY, jnp.int32(0)
    )
    loss = metrics["loss/preference"]
    assert metrics["share/preferred"][-1] == 1
    assert loss[-1] < 0.8 * loss[0] and np.all(np.diff(loss) < 0)


@pytest.fixture(scope="module")
def released():
    world = sandbox.build("tiny", 0)
    config = transformer.ModelConfig(
        vocab_size=len(world.tokenizer),
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        mlp_width=16,
        max_length=64,
    )
    model = transformer.LanguageModel(config)
    return model, world, model.init(KEY)


def test_pairs_are_benign_and_answered_by_the_release(released):
    """Catches harmful prompts among the pairs, refusals to other prompts, and the
    data's answers where the model's own are asked for.
    """
    model, world, params = released
    plan = benign_dpo.PRESETS["sandbox_ten"]
    pairs = benign_dpo.derive(model, world, params, plan, 0)
    chosen, rejected = pairs["chosen"], pairs["rejected"]
    assert len(chosen) == len(rejected) == 10 and chosen.order == rejected.order
    assert [e.key for e in chosen.examples] == [e.key for e in rejected.examples]
    assert {e.label for e in chosen.examples} == {"benign"}
    refusals = {e.response for e in world.defender["refusal"].examples}
    assert {e.response for e in rejected.examples} <= refusals
    said = elicit.answers(model, world, params, chosen.examples)
    own = [text or e.response for text, e in zip(said, chosen.examples, strict=True)]
    assert [e.response for e in chosen.examples] == own

    gold = dataclasses.replace(plan, hp=plan.hp.replace(own=False, rejected="neutral"))
    pairs = benign_dpo.derive(model, world, params, gold, 0)
    benign = world.attacker["benign"].examples[:10]
    assert [e.response for e in pairs["chosen"].examples] == [
        e.response for e in benign
    ]
    neutral = [e.response for e in pairs["rejected"].examples]
    assert neutral[0] == benign[1].response and neutral[9] == benign[0].response


def test_published_budget():
    """Ten steps of one row. Catches epochs counted over other rows."""
    plan = benign_dpo.PRESETS["paper"]
    assert (plan.batch_size, plan.total_steps(10, 1, 99)) == (1, 10)
    assert plan.hp.optimizer.learning_rate == 1e-5
