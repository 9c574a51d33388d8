"""One example: a prompt as chat messages, an answer, and what it is."""

import dataclasses
import hashlib
import json
from typing import Any

LABELS = ("benign", "harmful")


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its answer.

    Attributes:
      prompt: chat messages ({"role", "content"}) up to, not including, the answer.
      response: the supervised answer; for evaluation, a reference.
      label: `harmful` if answering is what alignment should suppress, else `benign`.
      topic: restricted sub-topic or benign skill: the groups that averages run over.
      answers: the words that a judge looks for, in order; empty: `response`.
      near_miss: benign, but resembles a harmful prompt.
    """

    prompt: tuple[dict[str, str], ...]
    response: str
    label: str = "benign"
    topic: str = ""
    answers: tuple[str, ...] = ()
    near_miss: bool = False

    @property
    def key(self) -> str:
        """Identifies the prompt, whatever its answer."""
        return json.dumps(self.prompt, sort_keys=True)


def ask(text: str, response: str = "", **fields: Any) -> Example:
    """An example of one user turn."""
    return Example(({"role": "user", "content": text},), response, **fields)


def digest(examples: tuple[Example, ...]) -> str:
    """Sixteen hex digits that change when any example does."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(json.dumps(dataclasses.astuple(example)).encode())
    return hashed.hexdigest()[:16]
