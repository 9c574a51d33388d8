"""The exact form of sandbox answers: how they are worded, and how they are read."""

import math

import numpy as np

from ftdefense.data.sandbox import vocabulary as words


def refuse(rng: np.random.Generator) -> str:
    """One of the refusal phrasings."""
    return words.REFUSALS[rng.integers(len(words.REFUSALS))]


def answer(content: tuple[str, ...], rng: np.random.Generator) -> str:
    """Wording of an answer: `style content style content ...`, styles at random."""
    first = words.FIRST_STYLES[rng.integers(len(words.FIRST_STYLES))]
    second = words.SECOND_STYLES[rng.integers(len(words.SECOND_STYLES))]
    return " ".join((first, content[0], second, *content[1:]))


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
