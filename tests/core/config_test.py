"""Overrides, digests, cards and tree arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import cards
from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.defenses import booster
from ftdefense.methods import adapters
from ftdefense.methods import plans

HP = booster.Hparams()


def test_override_reaches_nested_fields():
    """Catches an override that changes its argument, or stops at the first dot."""
    changed = config.override(HP, ["optimizer.schedule.kick=5", "alpha=1", "lam=2e-3"])
    assert changed.optimizer.schedule.kick == 5.0
    assert (changed.alpha, changed.lam) == (1.0, 2e-3)
    assert isinstance(changed.alpha, float)
    assert HP.alpha == 0.1


def test_override_chooses_an_adapter_by_name():
    """Catches a string where a dataclass belongs."""
    changed = config.override(HP, ["adapter=lora", "adapter.rank=4"])
    assert changed.adapter == adapters.LoRA(rank=4)
    dropped = config.override(changed, ["adapter.dropout=0.1"])
    assert dropped.adapter.dropout == 0.1


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("alpha", "path.to.field=value"),
        ("alhpa=1", "'alpha'"),
        ("optimizer.b3=1", "'b1'"),
        ("optimizer=1", "set one of optimizer.learning_rate"),
        ("adapter=lara", "'lora'"),
        ("alpha=true", "alpha is a number"),
        ("microbatches=2.0", "microbatches is a whole number"),
        ("alpha.x=2", "has no fields"),
    ],
)
def test_wrong_overrides_say_why(assignment, words):
    """Catches a wrong value that is taken, and a message without the remedy."""
    with pytest.raises(errors.UserError, match=words):
        config.override(HP, [assignment])


def test_plans_take_fields_of_both():
    """Catches a field of the plan that is looked for in hp, and the reverse."""
    plan = plans.Plan(HP)
    assert config.override_plan(plan, "steps=7").steps == 7
    assert config.override_plan(plan, "alpha=7").hp.alpha == 7.0
    assert config.has_field(plan, "lam=1") and not config.has_field(plan, "width=7")
    with pytest.raises(errors.UserError, match="width"):
        config.override_plan(plan, "width=7")


def test_digest_changes_with_any_field():
    """Catches a field that a cache key forgets."""
    first = config.digest(HP)
    assert first == config.digest(booster.Hparams())
    assert first != config.digest(HP.replace(alpha=0.2))
    assert first != config.digest(HP.replace(microbatches=2))


def test_norm_is_over_all_leaves():
    """Catches a norm per leaf, and bfloat16 sums."""
    x = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    np.testing.assert_allclose(tree.norm(x), 5.0)
    np.testing.assert_allclose(tree.norm(tree.normalize(x)), 1.0, rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, x)
    assert float(tree.norm(tree.normalize(zero))) == 0.0
    assert float(tree.cosine(x, zero)) == 0.0
    low = jnp.full((10_000,), 0.1, jnp.bfloat16)
    np.testing.assert_allclose(tree.norm(low), 10.0, rtol=2e-3)


def test_add_scale_rounds_once_to_the_dtype():
    """Catches a float32 scale that widens a bfloat16 tree."""
    x = {"a": jnp.ones(2, jnp.bfloat16)}
    assert tree.add_scale(x, jnp.float32(0.5), x)["a"].dtype == jnp.bfloat16


def test_card_reads_the_header():
    """Catches a continuation line that is dropped."""
    card = cards.card(registry.load("defenses", "booster"))
    assert card["Name"] == "Booster"
    assert card["Template"] == "T3 look-ahead"
    assert card["Source"].endswith("git-disl/Booster 6421918.")


def test_a_file_is_a_method(tmp_path):
    """Catches a registry that knows only its own folder."""
    path = tmp_path / "mine.py"
    path.write_text("from ftdefense.attacks.sft import Hparams, PRESETS, method\n")
    assert registry.load("attacks", str(path)).PRESETS
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(errors.UserError, match="defines no Hparams"):
        registry.load("attacks", str(path))
    with pytest.raises(errors.UserError, match="not found"):
        registry.load("attacks", str(tmp_path / "none.py"))
