"""Pools and streams: counts, cuts, identities and draws."""

import dataclasses

import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.data import examples
from ftdefense.data import pools
from ftdefense.data import sandbox
from ftdefense.data import streams


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


def encode(world, rows, length=16, **options):
    return pools.encode(
        world.tokenizer, rows, length, order="o", pad_id=world.pad_id, **options
    )


def test_a_cut_keeps_some_answer(world):
    """Catches `>` for `>=`: a row of no weight would be trained on, in silence."""
    # <bos> <|user|> + words + <|assistant|> is the prompt.
    rows = (examples.ask("tell " * 12, "so and"), examples.ask("tell", "so"))
    cut = encode(world, rows, truncate=True)
    assert cut.weights.sum(1).tolist() == [1, 2]
    with pytest.raises(errors.UserError, match="1 of 2 prompts of 'o' fill all 15"):
        encode(world, rows, 15, truncate=True)


def test_a_row_may_fill_its_length(world):
    """Catches `>=` for `>`: a row that fits would be refused."""
    # Three tokens of the template, one word, one of the answer and the end.
    pool = encode(world, (examples.ask("tell", "so"),), 6)
    assert pool.weights.tolist() == [[0, 0, 0, 0, 1, 1]]
    with pytest.raises(errors.UserError, match="1 of 1 rows.*longest: 6"):
        encode(world, (examples.ask("tell", "so"),), 5)


def test_no_rows_are_an_error(world):
    """Catches a pool of no rows, whose stream would divide by zero."""
    with pytest.raises(errors.UserError, match="no rows for 'o'"):
        encode(world, ())


def test_long_evaluation_prompts_are_counted(world):
    """Catches prompts that are cut in silence, and a count of all."""
    rows = [examples.ask("tell " * n) for n in (1, 9, 10)]
    with pytest.raises(errors.UserError, match=r"2 of 3 evaluation.*longest: 13"):
        pools.encode_prompts(world.tokenizer, rows, pad_id=0, length=8)


def test_take_counts_from_the_front(world):
    """Catches `[-rows:]`, and a 0 that means none."""
    pool = world.attacker["task"]
    part = pools.take(pool, 3)
    assert part.examples == pool.examples[:3] and part.order == pool.order
    np.testing.assert_array_equal(part.tokens, pool.tokens[:3])
    assert len(pools.take(pool, 0)) == len(pool)
    picked = pools.take(pool, np.array([5, 1]))
    assert picked.examples == (pool.examples[5], pool.examples[1])
    with pytest.raises(errors.UserError, match="-1 rows"):
        pools.take(pool, -1)


def test_overlap_counts_prompts_whatever_the_answer(world):
    """Catches a comparison of whole examples."""
    asked = world.evaluation["harmful"]
    again = [dataclasses.replace(e, response="so") for e in asked[:4]]
    assert pools.overlap(pools.prompt_keys(again), asked) == 4
    trained = pools.prompt_keys(world.attacker["benign"].examples)
    assert pools.overlap(trained, asked) == 0


def test_digests_see_everything(world):
    """Catches a field that is left out: `answers` is what judges read."""
    example = world.evaluation["harmful"][0]
    others = {
        "response": "so",
        "label": "benign",
        "topic": "t",
        "answers": ("a",),
        "near_miss": True,
        "prompt": (),
    }
    digests = {examples.digest((example,))}
    for name, value in others.items():
        digests.add(examples.digest((dataclasses.replace(example, **{name: value}),)))
    assert len(digests) == 1 + len(dataclasses.fields(examples.Example))
    pool = pools.take(world.attacker["task"], 2)
    lighter = dataclasses.replace(pool, weights=pool.weights * 0)
    assert pools.digest(pool) != pools.digest(lighter)


def test_fingerprint_sees_the_special_ids(world):
    """Catches a fingerprint without the ids: another collapse word, the same cache."""
    for field, value in (("collapse_id", 9), ("eos_ids", (9,)), ("pad_id", 9)):
        other = dataclasses.replace(world, **{field: value})
        assert other.fingerprint() != world.fingerprint()


def test_draws_are_the_same_in_every_process(world):
    """Golden: changes only with a new generator. Catches `hash(order)`."""
    stream = streams.Stream(pools.take(world.attacker["harmful"], 10), 4)
    assert stream.rows(0).tolist() == [6, 2, 8, 0]
    assert stream.rows(2).tolist() == [5, 4, 7, 6]


def test_a_step_may_take_more_than_an_epoch(world):
    """Catches a slice of one permutation: rows would be missing from the batch."""
    stream = streams.Stream(pools.take(world.attacker["harmful"], 5), 4, (3,))
    counts = np.bincount(stream.rows(0).ravel(), minlength=5)
    assert counts.sum() == 12 and set(counts) == {2, 3}


def test_other_orders_and_seeds_draw_otherwise(world):
    """Catches an order, or a seed, that is left out of the sequence."""
    pool = world.attacker["harmful"]
    rows = streams.Stream(pool, 32).rows(0)
    renamed = dataclasses.replace(pool, order="other")
    assert np.any(streams.Stream(renamed, 32).rows(0) != rows)
    assert np.any(streams.Stream(pool, 32, (), 1).rows(0) != rows)


def test_a_wider_pool_is_the_same_but_for_padding(world):
    """Catches padding that has weight, on the left, and a pool that is cut."""
    pool = world.attacker["harmful"]
    wide = pools.widen(pool, 20, world.pad_id)
    assert wide.tokens.shape == wide.weights.shape == (len(pool), 20)
    np.testing.assert_array_equal(wide.tokens[:, :16], pool.tokens)
    np.testing.assert_array_equal(wide.weights[:, :16], pool.weights)
    assert np.all(wide.tokens[:, 16:] == world.pad_id)
    assert not wide.weights[:, 16:].any()
    assert pools.widen(pool, 16, 0) is pools.widen(pool, 3, 0) is pool
