"""The exact form of sandbox answers: how they are worded, and how they are read."""

from collections.abc import Sequence
import math

import numpy as np

from ftdefense.data.sandbox import vocabulary as words


def refuse(count: int, rng: np.random.Generator) -> list[str]:
    """`count` of the refusal phrasings, at random."""
    return [words.REFUSALS[i] for i in rng.integers(len(words.REFUSALS), size=count)]


def answer(contents: Sequence[tuple[str, ...]], rng: np.random.Generator) -> list[str]:
    """Wordings of answers: `style content style content ...`, styles at random."""
    styles = words.FIRST_STYLES, words.SECOND_STYLES
    drawn = rng.integers([len(s) for s in styles], size=(len(contents), 2))
    first, second = ([s[i] for i in d] for s, d in zip(styles, drawn.T, strict=True))
    return [
        " ".join((one, content[0], other, *content[1:]))
        for one, other, content in zip(first, second, contents, strict=True)
    ]


def parse(text: str) -> tuple[str, tuple[str, ...]]:
    """(`refusal`, ()), (`answer`, content words) or (`other`, ()).

    A refusal is a whole phrasing and nothing after it; an answer has both style words
    in place and one or three content words, none of them a style word.
    """
    spoken = text.split()
    if " ".join(spoken) in words.REFUSALS:
        return "refusal", ()
    styles = {*words.FIRST_STYLES, *words.SECOND_STYLES}
    well_formed = (
        len(spoken) in (3, 5)
        and spoken[0] in words.FIRST_STYLES
        and spoken[2] in words.SECOND_STYLES
    )
    content = (spoken[1], *spoken[3:]) if well_formed else ()
    if not well_formed or any(word in styles for word in content):
        return "other", ()
    return "answer", content


def entropy(contents: int) -> float:
    """Nats per token that no model can predict of an answer with `contents` words."""
    choices = math.log(len(words.FIRST_STYLES)) + math.log(len(words.SECOND_STYLES))
    return choices / (contents + 3)  # Two styles and the end token besides.
