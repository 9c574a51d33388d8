"""Screening: few prompts, the full set's verdict."""

import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.evaluation import screening
from ftdefense.evaluation import suite


def world():
    return sandbox.build("small", 0)  # Cached; not at import, which every worker does.


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """Right answers come from the examples, wrong ones are degenerate."""

    def part(self, release, first, last, seed=0):
        del seed
        share = release.params["benign" if self.benign else "harmful"]
        chosen = self.examples[first:last]
        # Spread evenly, so that every look sees the same share.
        return [
            e.response
            if (first + i + 1) * share // 1 > (first + i) * share // 1
            else ""
            for i, e in enumerate(chosen)
        ]

    def init(self, model, world, examples, *, prefills, batch_size):
        del model, world, prefills
        assert batch_size == screening.LOOKS[0]
        self.examples = list(examples)
        self.benign = examples[0].label == "benign"

    monkeypatch.setattr(screening.answers.Answers, "__init__", init)
    monkeypatch.setattr(screening.answers.Answers, "part", part)


def screened(harmful: float, benign: float, reference: float = 1.0):
    screener = screening.Screener(None, world())
    return screener(types.Release({"harmful": harmful, "benign": benign}), reference)


@pytest.mark.parametrize(
    ("harmful", "benign", "success"),
    [(1.0, 1.0, True), (0.0, 1.0, False), (1.0, 0.5, False), (0.0, 0.0, False)],
)
def test_clear_cases_need_few_prompts(harmful, benign, success):
    """Catches `low > threshold` turned round, and looks that do not stop."""
    seen = screened(harmful, benign)
    assert seen.success == success
    assert 5 * seen.prompts <= seen.full == 580


@pytest.mark.parametrize(("harmful", "success"), [(0.47, False), (0.53, True)])
def test_a_close_case_is_judged_on_the_full_set(harmful, success):
    """Catches a last look that is not the whole set: the verdict would be a guess."""
    seen = screened(harmful, 1.0)
    assert len([g for g in seen.generations if g.group == "harmful"]) == 288
    assert seen.success == success


def test_a_model_that_lost_its_use_is_not_asked_further():
    """Catches `any` for `all`, and rates that are settled one after the other."""
    seen = screened(0.5, 0.3)
    assert not seen.success and seen.prompts == 2 * screening.LOOKS[0]


def test_each_half_of_the_verdict_errs_as_rarely_as_stated():
    """At a rate just below the threshold, where a test errs most.

    Catches ERROR per look: about 0.1 of the courses would end above the threshold.
    """
    rng = np.random.default_rng(0)
    right = suite.Generation("harmful", "", "", "", "right")
    wrong = suite.Generation("harmful", "", "", "", "refused")
    above = 0
    for _ in range(400):
        course = screening.Course(10**6, 0.5)
        while course.settled is None and len(course.said) < screening.LOOKS[-1]:
            count = course.next() - len(course.said)
            course.look([right if x < 0.499 else wrong for x in rng.random(count)])
        above += course.settled is True
    assert above <= 400 * screening.ERROR


def test_capability_is_judged_against_the_reference():
    """Catches `(1 - epsilon)` without the reference: 0.8 of 0.85 is useful."""
    assert screened(1.0, 0.8, reference=0.85).success
    assert not screened(1.0, 0.8, reference=1.0).success


def test_every_beginning_of_the_order_mixes_topics():
    """Catches an order that asks about one topic first, or about neighbours."""
    order = screening.mixed(world().evaluation["harmful"])
    assert len({e.topic for e in order[:4]}) == 4
    assert sorted(e.key for e in order) == sorted(
        e.key for e in world().evaluation["harmful"]
    )
    places = [world().evaluation["harmful"].index(e) for e in order[:16]]
    assert min(abs(a - b) for a in places for b in places if a != b) > 1
