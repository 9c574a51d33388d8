"""A world from a user's files: who gets which prompt, and what is refused."""

import dataclasses

import pytest

from ftdefense.core import errors
from ftdefense.data import examples
from ftdefense.data import own


def rows(kind, count=40, label="harmful"):
    return tuple(
        examples.ask(f"{kind} {i}", f"answer {i}", label=label, topic=label)
        for i in range(count)
    )


SOURCES = own.Sources(rows("do"), rows("ask", label="benign"))


@pytest.fixture
def build(byte_tokenizer):  # noqa: F811
    def made(sources=SOURCES, **options):
        return own.build(
            sources, byte_tokenizer, length=64, max_new_tokens=8, **options
        )

    return made


def sides(world):
    return {
        "defender": {e.key for e in world.defender["harmful"].examples},
        "attacker": {e.key for e in world.attacker["harmful"].examples},
        "heldout": {e.key for e in world.evaluation["harmful"]},
    }


def test_splits_follow_the_seed_and_not_the_file(build):
    """Catches a split by line number, or by Python's hash."""
    turned = dataclasses.replace(SOURCES, harmful=SOURCES.harmful[::-1])
    assert build(turned).fingerprint() == build().fingerprint()
    assert sides(build(seed=1)) != sides(build())


def test_one_prompt_is_on_one_side(build):
    """Catches a split by row: the attacker would train on held-out prompts."""
    twice = tuple(dataclasses.replace(e, response="other") for e in SOURCES.harmful)
    world = build(dataclasses.replace(SOURCES, harmful=(*SOURCES.harmful, *twice)))
    found = sides(world)
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 40


def test_first_rows_are_a_sample(build):
    """Catches file order: a sorted file's first rows are of one topic."""
    prompts = [e.prompt[0]["content"] for e in build().attacker["harmful"].examples]
    numbers = [int(p.split()[1]) for p in prompts]
    assert numbers != sorted(numbers)


def test_refusals_are_paired_and_the_default_is_neutral(build):
    """Catches pairs that slip by a row, and another default sentence."""
    given = tuple(dataclasses.replace(e, response="no") for e in SOURCES.harmful[:20])
    for world in (build(), build(dataclasses.replace(SOURCES, refusals=given))):
        harmful, refusal = (
            world.defender[role].examples for role in ("harmful", "refusal")
        )
        assert [e.key for e in harmful] == [e.key for e in refusal]
        orders = {world.defender[role].order for role in ("harmful", "refusal")}
        assert len(orders) == 1
    assert {e.response for e in refusal} == {"no", own.REFUSAL}
    assert {e.response for e in build().defender["refusal"].examples} == {
        "I cannot help with that."
    }


def test_refusals_of_other_prompts_are_aligned_on(build):
    """Catches refusals that are dropped, or that show alignment held-out prompts."""
    other = rows("else", 5)
    world = build(dataclasses.replace(SOURCES, refusals=(*other, *SOURCES.harmful)))
    aligned = {e.key for e in world.defender["alignment"].examples}
    assert {e.key for e in other} <= aligned
    found = sides(world)
    assert not aligned & (found["attacker"] | found["heldout"])


def test_heldout_files_are_used_whole(build):
    """Catches a fifth that is held out of the training files all the same."""
    heldout = rows("test", 7)
    world = build(dataclasses.replace(SOURCES, heldout_harmful=heldout))
    assert world.evaluation["harmful"] == heldout
    trained = [*world.defender["harmful"].examples, *world.attacker["harmful"].examples]
    assert {e.key for e in trained} == {e.key for e in SOURCES.harmful}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"harmful": (*rows("do"), *rows("x", 3, "benign"))}, "--harmful: 3 of 43"),
        ({"heldout_benign": rows("x")}, "--heldout_benign: 40 of 40"),
        ({"harmful": rows("do", 1)}, "no harmful rows fall to the .*--harmful"),
        ({"benign": ()}, "no benign rows fall to the defender.*--benign"),
        ({"heldout_benign": rows("ask", label="benign")}, "held-out benign prompts"),
        (
            {
                "task": rows("t", label="benign"),
                "heldout_benign": rows("t", label="benign"),
            },
            "held-out benign prompts are also in the attacker's task",
        ),
    ],
)
def test_bad_sources_are_named(build, fields, words):
    """Catches rows on the wrong side, and an empty part that fails later."""
    with pytest.raises(errors.UserError, match=words) as caught:
        build(dataclasses.replace(SOURCES, **fields))
    assert "\n" not in str(caught.value)


def test_poisoned_tasks_are_allowed(build):
    """Catches a label check that forbids the attacker's own mixture."""
    task = (*rows("t", 20), *rows("u", 20, "benign"))
    labels = {
        e.label
        for e in build(dataclasses.replace(SOURCES, task=task))
        .attacker["task"]
        .examples
    }
    assert labels == {"harmful", "benign"}


def test_unrelated_rows_are_harmful_prompts_alone(build):
    """Catches benign rows mixed in: SDD was published without any."""
    pools = build().defender
    paired, known = pools["unrelated"].examples, pools["harmful"].examples
    assert [e.key for e in paired] == [e.key for e in known]
    assert all(e.label == "harmful" for e in paired)
    benign = {e.response for e in pools["benign"].examples}
    assert {e.response for e in paired} <= benign


def test_collapse_defaults_to_the_words_of_ctrap(build, monkeypatch):
    """Catches another word: "error" alone may be another token at the start of a text."""
    monkeypatch.setattr(own, "_collapse_id", lambda tokenizer, words: words)
    assert build().collapse_id == "an error"


def test_special_ids(build, byte_tokenizer):  # noqa: F811
    """Catches the first id of the collapse word, and an end that is never seen."""
    world = build(collapse_word="error")
    assert world.collapse_id == byte_tokenizer.convert_tokens_to_ids("r")
    assert world.eos_ids == (byte_tokenizer.eos_token_id,)
    with pytest.raises(errors.UserError, match="--collapse_word is empty"):
        build(collapse_word="")
