"""The universal soft prompt (specs/attacks.md B.14), on a small decoder and the sandbox."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit import soft_prompt
from ftdefense.data import chat
from ftdefense.data import examples
from ftdefense.data import own
from ftdefense.data import pools
from ftdefense.data import sandbox
from ftdefense.models import transformer

COUNT = 3


@pytest.fixture(autouse=True)
def float64():
    """Not here: models of the module's fixtures are in float32."""


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


def decoder(world, **fields):
    config = transformer.ModelConfig(
        len(world.tokenizer), 16, 1, 2, 1, 16, max_length=18, **fields
    )
    model = transformer.LanguageModel(config)
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def found(world):
    return soft_prompt.extended(*decoder(world), world, COUNT, seed=1)


def test_plain_prompts_are_answered_as_before(world, found):
    """steps = 0. Catches rows in another place, and a head that says a soft token."""
    model, params = decoder(world)
    tokens = jnp.asarray(world.attacker["benign"].tokens[:4])
    before = jax.jit(model)(params, tokens).logits
    after = jax.jit(found.model)(found.params, tokens).logits
    size = before.shape[-1]
    np.testing.assert_allclose(after[..., :size], before, atol=1e-6)
    assert after.shape[-1] == size + COUNT
    assert np.all(np.argmax(after, -1) == np.argmax(before, -1))
    silent = after[..., world.pad_id, None]
    np.testing.assert_allclose(after[..., size:], jnp.repeat(silent, COUNT, -1))


def test_rows_start_from_tokens_that_exist(world, found):
    """Catches zeros, and one draw for every seed."""
    table = np.asarray(found.params["embed"]["embedding"])
    assert all((row == table[:-COUNT]).all(1).any() for row in table[-COUNT:])
    other = soft_prompt.extended(*decoder(world), world, COUNT, seed=2).params
    assert np.any(other["embed"]["embedding"][-COUNT:] != table[-COUNT:])


def test_a_tied_head_and_a_padded_table_work(world):
    """Catches a missing lm_head, and rows appended after the ids that they are for."""
    model, params = decoder(world, tied=True)
    grown = soft_prompt.extended(model, params, world, COUNT)
    assert "lm_head" not in grown.params
    padded = dataclasses.replace(model.config, vocab_size=len(world.tokenizer) + 8)
    model = transformer.LanguageModel(padded)
    params = model.init(jax.random.key(0))
    grown = soft_prompt.extended(model, params, world, COUNT)
    old, new = (p["embed"]["embedding"] for p in (params, grown.params))
    assert new.shape == old.shape and grown.adapter.first == len(world.tokenizer)
    np.testing.assert_array_equal(new[-5:], old[-5:])


def test_prompts_end_in_the_soft_tokens(world, found):
    """Catches a prefix, a tokenizer that splits the names, and the shared tokenizer."""
    first = found.adapter.first
    soft = [*range(first, first + COUNT)]
    example = found.world.evaluation["harmful"][0]
    ids = chat.render_prompt(found.world.tokenizer, example.prompt)
    assert ids[-COUNT - 1 : -1] == soft
    plain = chat.render_prompt(world.tokenizer, world.evaluation["harmful"][0].prompt)
    assert [i for i in ids if i not in soft] == plain
    pool = found.world.attacker["harmful"]
    assert pool.tokens.shape[1] == world.length + COUNT
    assert all(np.isin(soft, row).all() for row in pool.tokens)
    assert pool.weights.sum() == world.attacker["harmful"].weights.sum()
    assert len(world.tokenizer) == first and len(found.world.tokenizer) > first
    assert pools.digest(found.world.attacker["benign"]) == pools.digest(
        world.attacker["benign"]
    )


def test_a_tokenizer_of_bytes_makes_no_token_of_the_space_between(byte_tokenizer):
    """Catches a suffix of twice the length, half of it frozen, that cuts answers."""
    rows = [
        {"prompt": f"{kind} {i}", "response": f"answer {i}"}
        for kind in ("do", "ask")
        for i in range(20)
    ]
    harmful, benign = (
        [
            examples.ask(r["prompt"], r["response"], label=label)
            for r in rows
            if r["prompt"].startswith(kind)
        ]
        for kind, label in (("do", "harmful"), ("ask", "benign"))
    )
    world = own.build(
        own.Sources(harmful, benign), byte_tokenizer, length=64, max_new_tokens=4
    )
    found = soft_prompt.extended(*decoder(world), world, COUNT)
    pool, plain = (w.attacker["harmful"] for w in (found.world, world))
    real = [(p.tokens != world.pad_id).sum(1) for p in (pool, plain)]
    np.testing.assert_array_equal(real[0] - real[1], COUNT)
    assert pool.weights.sum() == plain.weights.sum()


def test_descent_lowers_the_loss_within_its_box(found):
    """Catches ascent, a moved weight, and a step that is not of the rate's length."""
    plan = soft_prompt.plan(found.adapter, learning_rate=2e-2, steps=16, batch_size=32)
    (*_, release), log = soft_prompt.attacked(found, plan)
    assert log[-1]["loss"] < log[0]["loss"] - 0.02
    before, after = found.params, release.params
    moved = np.abs(after["embed"]["embedding"] - before["embed"]["embedding"])
    assert 0.1 < moved[-COUNT:].max() <= 16 * 2e-2 + 1e-6
    assert not moved[:-COUNT].any()
    jax.tree.map(np.testing.assert_array_equal, after["layers"], before["layers"])
    np.testing.assert_array_equal(
        after["lm_head"]["kernel"], before["lm_head"]["kernel"]
    )


def test_any_of_ten_generations_counts(found, monkeypatch):
    """Catches the last one alone, checkpoints four steps apart, eleven of them, and a
    share of generations in the place of prompts.
    """
    plan = soft_prompt.plan(found.adapter, learning_rate=2e-2, steps=40, batch_size=8)
    releases, log = soft_prompt.attacked(found, plan)
    tables = [np.asarray(r.params["embed"]["embedding"]) for r in releases]
    # Chunks end at 3, 6, .. 39, 40: 40, 33, 27, .. 3 are far enough apart.
    assert [entry["step"] for entry in log][-2:] == [39, 40]
    assert len(tables) == 7 and np.any(tables[-1] != tables[-2])
    many = soft_prompt.plan(found.adapter, steps=96, batch_size=8)
    assert len(soft_prompt.attacked(found, many)[0]) == soft_prompt.CHECKPOINTS
    examples = found.world.evaluation["harmful"]

    def said(self, release):
        right = release % len(self)
        return [e.response if i == right else "" for i, e in enumerate(examples)]

    monkeypatch.setattr(soft_prompt.answers.Answers, "__call__", said)
    assert soft_prompt.harm(found, [0, 1, 1], 1000) == 2 / len(examples)
