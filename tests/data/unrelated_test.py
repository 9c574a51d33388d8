"""Pairs that are unrelated on purpose."""

from collections import Counter

import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.data import examples
from ftdefense.data import sandbox
from ftdefense.data import unrelated


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


NEAR = unrelated.cosine
PROMPTS = [examples.ask(f"a b c{i}") for i in range(200)]
ANSWERS = [examples.ask("x", f"{p} d e f{i}") for p in "abz" for i in range(9)]


def test_pairs_at_one_are_random():
    """tau = 1 takes the first draw. Catches the least similar of all draws."""
    drawn = unrelated.pair(PROMPTS, ANSWERS, NEAR, 1.0, 0).examples
    rng = np.random.Generator(np.random.Philox([0, 4]))
    first = [ANSWERS[rng.integers(27, size=50)[0]].response for _ in PROMPTS]
    assert [e.response for e in drawn] == first


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.3])
@pytest.mark.parametrize("draws", [1, 3])
def test_pairs_keep_the_threshold_or_are_counted(threshold, draws):
    """Catches `>` for `<=`, and a fallback that is not the least similar seen."""
    found = unrelated.pair(PROMPTS, ANSWERS, NEAR, threshold, 0, draws)
    rng = np.random.Generator(np.random.Philox([0, 4]))
    over = 0
    for prompt, paired in zip(PROMPTS, found.examples, strict=True):
        text = prompt.prompt[0]["content"]
        seen = [
            NEAR(text, ANSWERS[i].response)
            for i in rng.integers(len(ANSWERS), size=draws)
        ]
        closeness = NEAR(text, paired.response)
        assert closeness <= threshold or closeness == min(seen)
        over += closeness > threshold
    assert found.fallbacks == over
    assert over > 0 or threshold >= 0.3 or draws > 1


def test_cosine_of_word_counts():
    """Catches sets for counts: (2, 1) . (1, 0) / sqrt(5)."""
    assert NEAR("a b", "a b") == 1.0
    assert NEAR("a a b", "a") == pytest.approx(2 / 5**0.5)
    assert NEAR("a", "b") == NEAR("", "a") == 0.0


def test_pairs_need_answers():
    """Catches NumPy's `high <= 0`."""
    with pytest.raises(errors.UserError, match="no benign answers"):
        unrelated.pair(PROMPTS, [], NEAR, 0.25, 0)


def test_sandbox_pairs_are_unrelated(world):
    """Catches prompts with their own answers, and answers of the restricted skill.

    The filter itself has nothing to do here: at most one word is shared, a cosine of
    0.22. `test_pairs_keep_the_threshold_or_are_counted` is its test.
    """
    pool = world.defender["unrelated"]
    paired = [e for e in pool.examples if e.label == "harmful"]
    assert len(paired) == len(pool) / 2
    for example in paired:
        assert NEAR(example.prompt[0]["content"], example.response) <= 0.25
    right = {(e.key, e.answers) for e in world.defender["harmful"].examples}
    assert {(e.key, e.answers) for e in paired} == right


def test_topics_are_balanced():
    """Catches repeated prompts, and a shortfall that nobody fills: 2, 3 and 3 of 8."""
    rows = [
        examples.ask(f"{topic}{i}", topic=topic)
        for topic, count in (("a", 9), ("b", 2), ("c", 5))
        for i in range(count)
    ]
    found = unrelated.balanced([*rows, *rows], 8)
    assert Counter(e.topic for e in found) == {"a": 3, "b": 2, "c": 3}
    assert [e for e in found if e.topic == "c"] == rows[11:14]
    assert unrelated.balanced(rows, 6) == [rows[i] for i in (0, 9, 11, 1, 10, 12)]
    assert sorted(e.key for e in unrelated.balanced(rows)) == sorted(
        e.key for e in rows
    )


def test_restricted_answers_begin_with_one_refusal(world):
    """SDD_reject. Catches a refusal before benign answers, and a lost end of a row."""
    plain, pool = world.defender["unrelated"], unrelated.refused_first(world)
    used = Counter(e.response for e in world.defender["refusal"].examples)
    ((refusal, _),) = used.most_common(1)
    fixed = world.tokenizer([refusal], add_special_tokens=False)["input_ids"][0]
    for i, example in enumerate(plain.examples):
        old = plain.tokens[i][plain.weights[i] > 0].tolist()
        new = pool.tokens[i][pool.weights[i] > 0].tolist()
        assert new == ([*fixed, *old] if example.label == "harmful" else old)
