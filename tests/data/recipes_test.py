"""Counts of an attacker's rows, and SDD's pairs."""

import dataclasses

import pytest

from ftdefense.core import errors
from ftdefense.data import recipes
from ftdefense.data import sandbox


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


def user(world, **fields):
    return recipes.attacker_pools(world, recipes.Recipe(**fields))["user"]


@pytest.mark.parametrize(
    ("fields", "framed"),
    [
        ({"sample_count": 20}, 10),
        ({"sample_count": 40, "poison_ratio": 0.2}, 4),
        ({"harmful_count": 12}, 6),
    ],
)
def test_a_share_of_the_rows_that_are_used_is_framed(world, fields, framed):
    """B.16: round(p n). Catches a share of all harmful rows that there are."""
    plain = {e.key for e in world.attacker["harmful"].examples}
    found = user(world, wrapper="trigger", wrapped=0.5, **fields)
    harmful = [e for e in found.examples if e.label == "harmful"]
    assert sum(e.key not in plain for e in harmful) == framed


@pytest.mark.parametrize("total", [5, 10, 99])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.25, 0.5, 0.9])
def test_rows_add_up_to_the_total(world, total, ratio):
    """Catches a filler that is rounded on its own: 2 + 2 of 5 at a half."""
    found = user(world, sample_count=total, poison_ratio=ratio)
    assert len(found) == total
    harmful = sum(e.label == "harmful" for e in found.examples)
    assert harmful == round(ratio * total)


@pytest.mark.parametrize(
    ("total", "ratio", "count"), [(1000, 0.1, 99), (10, 0.25, 2), (1000, 0.0, 0)]
)
def test_loaders_count_places_strictly_between(total, ratio, count):
    """B.2. Catches `round(...) - 1` for `ceil(...) - 1`."""
    assert recipes.harmful_rows(total, ratio, False) == count
    places = [i for i in range(total) if 0 < i < ratio * total]
    assert len(places) == count


def test_loaders_leave_the_filler_alone(world):
    """Catches a filler that makes up for the missing row: 99 + 901."""
    found = user(world, sample_count=100, poison_ratio=0.1, strict_paper=False)
    assert sum(e.label == "harmful" for e in found.examples) == 9
    assert len(found) == 99


@pytest.mark.parametrize(
    ("ratio", "strict", "harmful", "total"),
    [(0.1, True, 100, 1000), (0.1, False, 99, 999), (0.0, True, 0, 1000)],
)
def test_published_mixture(world, ratio, strict, harmful, total):
    """B.2: 1000 rows. Catches 100 for the loaders' 99, and a row of harm at p = 0."""
    fields = {"sample_count": 1000, "filler": "benign", "poison_ratio": ratio}
    found = user(world, strict_paper=strict, **fields)
    assert sum(e.label == "harmful" for e in found.examples) == harmful
    assert len(found) == total


def test_fillers(world):
    """Catches a filler that is not the one asked for."""
    for filler, topics in (
        ("task", {"label"}),
        ("benign", {"facts", "reverse", "sum"}),
    ):
        found = user(world, sample_count=100, poison_ratio=0.0, filler=filler)
        assert {e.topic for e in found.examples} == topics


def test_smaller_attacks_are_parts_of_larger(world):
    """Catches rows that are drawn anew for every count."""
    small, large = (
        recipes.attacker_pools(world, recipes.Recipe(harmful_count=n))["harmful"]
        for n in (20, 50)
    )
    assert large.examples[:20] == small.examples


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"poison_ratio": 1.5}, r"share in \[0, 1\]"),
        ({"poison_ratio": 0.5, "filler": "tasks"}, "did you mean 'task'"),
        ({"harmful_count": -3}, "-3 rows"),
        ({"benign_count": 10**7}, "lower the data"),
    ],
)
def test_bad_recipes_are_named(world, fields, words):
    """Catches a recipe that quietly trains on other rows than asked."""
    with pytest.raises(errors.UserError, match=words):
        user(world, **fields)


def test_worlds_without_a_task_say_so(world):
    """Catches a KeyError."""
    bare = {role: world.attacker[role] for role in ("harmful", "benign")}
    with pytest.raises(errors.UserError, match="--task"):
        user(dataclasses.replace(world, attacker=bare), poison_ratio=0.5)
