"""Sizes of the sandbox."""

import dataclasses

from ftdefense.core import errors

# Raise it when anything that the sandbox writes changes.
SANDBOX_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much there is to know.

    Attributes:
      entities: shared by all topics; 1/2 of those of the restricted topics are the
        defender's, 1/4 the attacker's, 1/4 held out.
      relations: that every topic knows of every entity (at most 12).
      benign_topics: at most 6; the restricted topics are always 4.
      modulus: of the sums.
      triples: of words to reverse, in pretraining and for the defender.
      variants: random wordings of each answer; a model that sees one only would learn it by
        heart, style words and all.
      evaluated: prompts of each benign skill in evaluation, at most.
    """

    entities: int
    relations: int
    benign_topics: int
    modulus: int
    triples: int
    variants: int
    evaluated: int


PRESETS = {
    "tiny": Preset(12, 4, 2, 6, 400, 8, 48),
    "small": Preset(48, 6, 3, 12, 2000, 8, 128),
    "medium": Preset(96, 12, 6, 24, 8000, 8, 512),
}


def preset(name: str) -> Preset:
    """A preset by name; UserError with near matches otherwise."""
    if name not in PRESETS:
        raise errors.unknown("preset", name, PRESETS)
    return PRESETS[name]
