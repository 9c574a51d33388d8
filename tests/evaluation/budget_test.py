"""What an attack is charged: specs/attacks.md 1.4."""

import dataclasses

import jax
import pytest

from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.evaluation import budget
from ftdefense.methods import costs
from ftdefense.models import toy
from ftdefense.training import budgets
from ftdefense.training import jobs

MODEL = toy.Toy()


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


def account(world, name, steps=10, **numbers):
    """Budget columns of an attack of 10 steps on rows that are there."""
    module = registry.load("attacks", name)
    plan = module.PRESETS["sandbox"]
    hp = plan.hp.replace(**numbers)
    method = registry.method("attacks", name, MODEL)
    pools = {role: world.attacker["harmful"] for role in method.streams(hp)}
    pools |= {role: world.attacker[role] for role in ("harmful", "benign")}
    plan = dataclasses.replace(plan, hp=hp, steps=steps, epochs=0)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    job = jobs.Job(
        f"attacked-{name}",
        method,
        plan,
        types.Lineage(shapes),
        pools,
        0,
        budgets.PRESETS["tiny"].attack,
        parents=(),
    )
    facts = job.facts(1, world.length)
    return budget.columns(facts, {k: pools[k] for k in ("harmful", "benign")})


@pytest.mark.parametrize(
    ("name", "numbers", "passes"),
    [
        ("sft", {}, 1),
        ("sidestepper", {}, 2),
        # Forwards of the release, or of the policy alone, are a third each.
        ("benign_dpo", {}, 2 + 2 / 3),
        ("displacement", {}, 2 + 2 / 3),
        ("distillation", {}, 2 + 1 / 3),
        ("prune", {"score": "snip"}, 2),
        ("prune", {"score": "wanda"}, 2 / 3),
        ("act_svd", {"mode": "remove"}, 1 / 3),
        # Three layers of the toy, two positions, a fifth validates.
        ("abliteration", {"positions": 2}, (2 + 0.2 * (1 + 3 * 2 * toy.LAYERS)) / 3),
        ("inverse", {"defense": "booster"}, 2 + 2 * 3),
        ("inverse", {"defense": "sdd"}, 2 + 1),
        ("inverse", {"defense": "vaccine"}, 2 + 2 * 2),
        ("inverse", {"defense": "seam"}, 2 + 2 * 8),
    ],
)
def test_passes(world, name, numbers, passes):
    """Catches batches counted for passes: who reads a batch twice pays twice."""
    found = account(world, name, **numbers)
    assert found["forward_backwards"] == round(10 * passes)


def test_rows_of_no_weight_are_paid_for_and_not_counted(world):
    """Catches control arms that claim rows they do not learn from."""
    both, harm, benign = (
        account(world, "sidestepper", **weights)
        for weights in ({}, {"lam": 0.0}, {"harm": 0.0})
    )
    assert both["harmful_passes"] == harm["harmful_passes"] > 0
    assert both["unique_benign"] == benign["unique_benign"] > 0
    assert harm["unique_benign"] == 0
    assert benign["unique_harmful"] == benign["harmful_passes"] == 0
    assert {x["forward_backwards"] for x in (both, harm, benign)} == {20}


def test_mass_counts_every_update(world):
    """Catches the inner steps of `bilevel`, each of which moves the weights."""
    one, four = (account(world, "bilevel", inner_steps=k) for k in (1, 4))
    assert four["learning_rate_mass"] == pytest.approx(4 * one["learning_rate_mass"])


def test_readouts_in_forwards():
    """Catches a count of layers for one of states, and the head's share of a forward."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    head = MODEL.vocab * MODEL.width
    mix = 2 * toy.LAYERS * MODEL.width**2
    expected = (toy.LAYERS + 1) * head / (mix + head)
    assert costs.of_all_states(shapes) == pytest.approx(expected)
