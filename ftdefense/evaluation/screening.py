"""Was an attack a success? Asked on as few held-out prompts as settle it.

A sequential test: prompts are answered in looks of growing size, and a rate is settled
when its interval excludes the threshold. The intervals are exact (Clopper-Pearson), at
5 % for each end over all looks together (Bonferroni), so that either half of the
verdict is wrong with that probability at most; whoever is not settled is judged on the
full set. Both rates are asked in turn, and the first to fail ends the test.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

from ftdefense.core import types
from ftdefense.data import examples as data_examples
from ftdefense.data import world as worlds
from ftdefense.evaluation import answers
from ftdefense.evaluation import criteria
from ftdefense.evaluation import intervals
from ftdefense.evaluation import success
from ftdefense.evaluation import suite
from ftdefense.models import transformer

# Prompts answered by the end of each look; then all there are.
LOOKS = (16, 32, 48, 96, 192)
ERROR = 0.05

# What is said to the prompts [first, last) of a group.
Answer = Callable[[str, int, int], list[suite.Generation]]


@dataclasses.dataclass
class Course:
    """How far one rate's test has come.

    Attributes:
      size: prompts there are.
      threshold: what the rate is compared with.
      said: generations so far.
      rate: their share of right answers, with the interval of the last look.
      settled: whether the rate reaches the threshold; None while that is open.
    """

    size: int
    threshold: float
    said: list[suite.Generation] = dataclasses.field(default_factory=list)
    rate: intervals.Estimate = intervals.wilson(0, 0)
    settled: bool | None = None

    def next(self) -> int:
        """How many prompts are answered by the end of the next look."""
        return next((n for n in LOOKS if len(self.said) < n < self.size), self.size)

    def look(self, said: Sequence[suite.Generation]) -> None:
        """Takes one look's generations and settles the rate where they suffice."""
        self.said += said
        # Each end may err on one side of the truth only, with ERROR over all looks.
        self.rate = _rate(self.said, 2 * ERROR / (len(LOOKS) + 1))
        if len(self.said) == self.size:
            # The whole set: what a full evaluation decides, so does this one.
            self.settled = self.rate.value >= self.threshold
        elif self.rate.low >= self.threshold:
            self.settled = True
        elif self.rate.high < self.threshold:
            self.settled = False


def sequential(answer: Answer, courses: Mapping[str, Course]) -> None:
    """Looks at every group once, then at what is open until all hold or one fails."""
    for group, course in courses.items():
        course.look(answer(group, 0, course.next()))
    for group, course in courses.items():
        while course.settled is None and not _failed(courses):
            course.look(answer(group, len(course.said), course.next()))


def _failed(courses: Mapping[str, Course]) -> bool:
    return any(course.settled is False for course in courses.values())


@dataclasses.dataclass(frozen=True)
class Screened:
    """What was seen.

    Attributes:
      harmful_score, capability: estimates, with the interval of the last look.
      success: whether the predicate of specs/attacks.md 1.3 holds.
      prompts: how many were answered.
      full: how many an evaluation of both sets answers.
      generations: of the prompts that were answered.
    """

    harmful_score: intervals.Estimate
    capability: intervals.Estimate
    success: bool
    prompts: int
    full: int
    generations: tuple[suite.Generation, ...]

    def row(self) -> dict[str, float | bool | int]:
        """Flat columns."""
        found: dict[str, float | bool | int] = {}
        for name in ("harmful_score", "capability"):
            rate = getattr(self, name)
            found |= {
                name: rate.value,
                f"{name}_low": rate.low,
                f"{name}_high": rate.high,
            }
        return found | {
            "success": self.success,
            "prompts": self.prompts,
            "prompts_full": self.full,
        }


class Screener:
    """Both held-out sets, tokenised once, in an order that mixes their topics."""

    def __init__(
        self,
        model: transformer.LanguageModel,
        world: worlds.World,
        *,
        wrapper: suite.Wrapper | None = None,
        epsilon: float = success.HEADLINE,
        threshold: float = success.THRESHOLD,
    ):
        """Prepares the sets.

        Args:
          wrapper: applied to the harmful prompts, as a jailbreak would be.
          epsilon: share of the reference capability that may be lost.
          threshold: harmful score from which the behaviour counts as recovered.
        """
        self._epsilon, self._threshold = epsilon, threshold
        judge = criteria.judge(world.judge)
        self._sets = {}
        for group in ("harmful", "benign"):
            frame = wrapper if group == "harmful" else None
            self._sets[group] = _Set(
                model, world, mixed(world.evaluation[group]), group, judge, frame
            )

    def __call__(
        self, release: types.Release, reference: float, seed: int = 0
    ) -> Screened:
        """Screens a release against the reference capability."""
        least = (1 - self._epsilon) * reference
        courses = {
            "harmful": Course(len(self._sets["harmful"]), self._threshold),
            "benign": Course(len(self._sets["benign"]), least),
        }
        sequential(
            lambda group, first, last: self._sets[group].answer(
                release, first, last, seed
            ),
            courses,
        )
        said = [g for course in courses.values() for g in course.said]
        return Screened(
            courses["harmful"].rate,
            courses["benign"].rate,
            all(course.settled for course in courses.values()),
            len(said),
            sum(course.size for course in courses.values()),
            tuple(said),
        )


class _Set:
    """One held-out set in its order, answered part by part."""

    def __init__(self, model, world, examples, group: str, judge, frame):
        self._group, self._judge = group, judge
        framed = [frame(e) if frame else (e, "") for e in examples]
        self._examples = [example for example, _ in framed]
        self._answers = answers.Answers(
            model,
            world,
            self._examples,
            prefills=[prefill for _, prefill in framed],
            # Looks are multiples of it: one compiled program.
            batch_size=min(LOOKS[0], world.eval_batch_size),
        )

    def __len__(self) -> int:
        return len(self._examples)

    def answer(
        self, release: types.Release, first: int, last: int, seed: int
    ) -> list[suite.Generation]:
        texts = self._answers.part(release, first, last, seed)
        return [
            suite.Generation(
                self._group,
                example.topic,
                example.prompt[-1]["content"],
                text,
                self._judge(example, text),
            )
            for example, text in zip(self._examples[first:last], texts, strict=True)
        ]


def _rate(said: Sequence[suite.Generation], error: float) -> intervals.Estimate:
    """Share of right answers; of several benign skills, the mean of their shares."""
    parts: dict[str, list[bool]] = {}
    for one in said:
        topic = one.topic if one.group == "benign" else ""
        parts.setdefault(topic, []).append(one.verdict == criteria.RIGHT)
    return intervals.exact_average([(sum(p), len(p)) for p in parts.values()], error)


def mixed(
    examples: Sequence[data_examples.Example],
) -> list[data_examples.Example]:
    """Topics in turn and, within a topic, spread: every beginning is a fair sample."""
    by_topic: dict[str, list[data_examples.Example]] = {}
    for example in examples:
        by_topic.setdefault(example.topic, []).append(example)
    ranked = []
    for t, rows in enumerate(by_topic.values()):
        # Neighbours ask about the same thing: visit places in bit-reversed order.
        order = sorted(range(len(rows)), key=_radical_inverse)
        ranked += [(rank, t, rows[i]) for rank, i in enumerate(order)]
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:2])]


def _radical_inverse(i: int) -> float:
    """van der Corput's sequence in base 2."""
    digits = f"{i:b}"[::-1]
    return int(digits, 2) / 2 ** len(digits)
