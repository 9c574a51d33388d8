"""What the user of a fine-tuning service submits."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from ftdefense.attacks import selected_benign
from ftdefense.attacks import sft
from ftdefense.attacks import sidestepper
from ftdefense.attacks import ten_benign
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import sandbox
from ftdefense.methods import elicit
from ftdefense.models import toy
from ftdefense.training import serving

WORLD = sandbox.build("tiny", 0)
MODEL = toy.Toy(vocab=len(WORLD.tokenizer))
BENCH = types.SimpleNamespace(world=WORLD, model=MODEL)
RELEASE = types.SimpleNamespace(params=MODEL.init(jax.random.key(0)))


def submitted(name, plan):
    return serving.submitted(BENCH, name, plan, RELEASE, 0)


def test_selected_rows_are_submitted():
    """Catches the rows of the recipe in their place: harmful ones."""
    plan = selected_benign.PRESETS["sandbox_random"]
    plan = dataclasses.replace(plan, hp=plan.hp.replace(count=8))
    found = submitted("selected_benign", plan)
    made = selected_benign.derive(MODEL, WORLD, RELEASE.params, plan, 0)["selected"]
    np.testing.assert_array_equal(found.tokens, made.tokens)
    assert {e.label for e in found.examples} == {"benign"}


def test_two_roles_are_one_file(monkeypatch):
    """Catches a role that is left out, in rows of two lengths."""
    monkeypatch.setattr(elicit, "refusals", lambda *_: ["no"])
    longer = lambda world, rows, said: pools.widen(rows, 40, world.pad_id)  # noqa: E731
    monkeypatch.setattr(elicit, "worded", longer)
    plan = ten_benign.PRESETS["sandbox"]
    found = submitted("ten_benign", plan)
    benign = recipes.attacker_pools(WORLD, plan.data)["benign"]
    assert found.tokens.shape == (20, 40)
    np.testing.assert_array_equal(found.tokens[10:, : WORLD.length], benign.tokens)


@pytest.mark.parametrize(
    ("name", "module", "ratio"), [("sft", sft, 1.0), ("sidestepper", sidestepper, 0.5)]
)
def test_others_submit_their_recipe(name, module, ratio):
    """Half of each where both are drawn. Catches the recipe of SideStepper as it is."""
    plan = module.PRESETS["sandbox"]
    found = submitted(name, plan)
    expected = {"poison_ratio": ratio}
    expected |= {"filler": "benign"} if ratio < 1 else {}
    assert found == dataclasses.replace(plan.data, **expected)


def test_identity_shifting_submits_framed_rows():
    """Catches benign rows without their frame."""
    plan = dataclasses.replace(
        sft.PRESETS["sandbox"],
        data=recipes.Recipe(
            poison_ratio=0.0, filler="benign", wrapper="persona", sample_count=5
        ),
    )
    found = submitted("sft", plan)
    bare = recipes.attacker_pools(WORLD, dataclasses.replace(plan.data, wrapper=""))
    assert len(found) == 5
    assert all(
        framed.prompt != plain.prompt
        for framed, plain in zip(found.examples, bare["user"].examples, strict=True)
    )
