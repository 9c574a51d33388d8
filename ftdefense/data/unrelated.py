"""SDD's data: harmful prompts with fluent answers to something else.

Source: Chen et al. 2025, arXiv:2507.21182, as read in TamperBench's port.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from ftdefense.core import errors
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import world as worlds

# (prompt text, answer text) -> at most 1.
Similarity = Callable[[str, str], float]
PROMPTS = 8000  # Published; of a user's own rows, so many at most.


class Paired(NamedTuple):
    """Examples with unrelated answers, and how many had to settle for a similar one."""

    examples: list[data_examples.Example]
    fallbacks: int


def cosine(first: str, second: str) -> float:
    """Cosine of word counts: the sandbox's stand-in for sentence embeddings."""
    a, b = Counter(first.split()), Counter(second.split())
    squares = sum(n * n for n in a.values()) * sum(n * n for n in b.values())
    # One root of the product: equal texts give 1 exactly, not a digit more.
    dot = sum(a[word] * b[word] for word in a)
    return dot / math.sqrt(squares) if squares else 0.0


def pair(
    prompts: Sequence[data_examples.Example],
    answers: Sequence[data_examples.Example],
    similarity: Similarity,
    threshold: float,
    seed: int,
    draws: int = 50,
) -> Paired:
    """Gives each prompt a random answer at most `threshold` similar to it.

    After `draws` tries the least similar one seen is kept, and counted. Source: SDD,
    arXiv:2507.21182, its pairing as read in TamperBench's port.

    Args:
      similarity: (prompt text, answer text) -> at most 1; pluggable.

    Raises:
      UserError: if there are no answers to draw from.
    """
    if not answers:
        raise errors.UserError("no benign answers to pair harmful prompts with.")
    rng = np.random.Generator(np.random.Philox([seed, 4]))
    paired, fallbacks = [], 0
    for prompt in prompts:
        text = prompt.prompt[-1]["content"]
        best, closeness = None, math.inf
        for i in rng.integers(len(answers), size=draws):
            near = similarity(text, answers[i].response)
            if near < closeness:
                best, closeness = answers[i], near
            if near <= threshold:
                break
        fallbacks += closeness > threshold
        paired.append(dataclasses.replace(prompt, response=best.response))
    return Paired(paired, fallbacks)


def balanced(
    prompts: Sequence[data_examples.Example], count: int = PROMPTS
) -> list[data_examples.Example]:
    """At most `count` different prompts, as many of each topic as there are.

    Topics take turns, each in the order given; one that has run out leaves its turns to
    the others.
    """
    topics: dict[str, dict[str, data_examples.Example]] = {}
    for example in prompts:
        topics.setdefault(example.topic, {}).setdefault(example.key, example)
    turns = itertools.zip_longest(*(of.values() for of in topics.values()))
    dealt = (example for turn in turns for example in turn if example is not None)
    return list(itertools.islice(dealt, count))


def refused_first(world: worlds.World) -> pools.Pool:
    """The role `unrelated`, each of its restricted answers after one fixed refusal.

    SDD_reject: what refuses and then wanders off stays a refusal. The refusal is the one
    that the defender's rows use most.
    """
    pool = world.defender["unrelated"]
    refusals = (e.response for e in world.defender["refusal"].examples)
    ((refusal, _),) = Counter(refusals).most_common(1)
    (longer,) = world.tokenizer([refusal], add_special_tokens=False)["input_ids"]
    return pools.encode(
        world.tokenizer,
        [
            dataclasses.replace(e, response=f"{refusal} {e.response}")
            if e.label == "harmful"
            else e
            for e in pool.examples
        ],
        pool.tokens.shape[1] + len(longer),
        order="unrelated",
        pad_id=world.pad_id,
        truncate=True,
    )
