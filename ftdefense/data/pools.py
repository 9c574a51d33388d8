"""Tokenised rows in host memory: right-padded to train on, left-padded to continue."""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import examples as data_examples


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Rows to train on.

    Attributes:
      tokens: int32 [rows, L], padded on the right.
      weights: float32 [rows, L]: 1 on answers and their end token, else 0.
      order: rows of pools of equal `order` and size are drawn together.
      examples: row i was made from `examples[i]`.
    """

    tokens: np.ndarray
    weights: np.ndarray
    order: str
    examples: tuple[data_examples.Example, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts to continue: int32 [n, P] padded on the left, and where they are real."""

    tokens: np.ndarray
    mask: np.ndarray


def encode(
    tokenizer: Any,
    examples: Sequence[data_examples.Example],
    length: int,
    *,
    order: str,
    pad_id: int,
    truncate: bool = False,
) -> Pool:
    """Tokenises examples to rows of `length` ids.

    Raises:
      UserError: if there are none, or some are longer than `length` and `truncate` is
        off (says how many, and how long the longest is), or a cut leaves no answer.
    """
    examples = tuple(examples)
    if not examples:
        raise errors.UserError(f"no rows for {order!r}: the role's data is empty.")
    rows = chat.render_rows(tokenizer, examples)
    too_long = [len(ids) for ids, _ in rows if len(ids) > length]
    if too_long and not truncate:
        raise errors.UserError(
            f"{len(too_long)} of {len(rows)} rows of {order!r} are longer than "
            f"{length} tokens (the longest: {max(too_long)}); raise --length or "
            "pass --truncate."
        )
    prompts = [prompt for _, prompt in rows if prompt >= length]
    if prompts:
        raise errors.UserError(
            f"{len(prompts)} of {len(rows)} prompts of {order!r} fill all {length} "
            f"tokens (the longest: {max(prompts)}), which leaves no answer to train "
            "on; raise --length or remove them."
        )
    tokens = np.full((len(rows), length), pad_id, np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, (ids, prompt) in enumerate(rows):
        kept = ids[:length]
        tokens[i, : len(kept)] = kept
        weights[i, prompt : len(kept)] = 1.0
    return Pool(tokens, weights, order, examples)


def encode_prompts(
    tokenizer: Any,
    examples: Sequence[data_examples.Example],
    *,
    pad_id: int,
    prefills: Sequence[str] | None = None,
    length: int | None = None,
) -> Prompts:
    """Tokenises prompts for generation, padded on the left to the longest of them.

    Raises:
      UserError: if one is longer than `length`.
    """
    prefills = prefills or [""] * len(examples)
    rows = [
        chat.render_prompt(tokenizer, example.prompt, prefill)
        for example, prefill in zip(examples, prefills, strict=True)
    ]
    longest = max(map(len, rows))
    if length is not None and longest > length:
        count = sum(len(row) > length for row in rows)
        raise errors.UserError(
            f"{count} of {len(rows)} evaluation prompts are longer than {length} "
            f"tokens (the longest: {longest}); raise --length or shorten them."
        )
    tokens = np.full((len(rows), longest), pad_id, np.int32)
    mask = np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = True
    return Prompts(tokens, mask)


def concatenate(pools: Sequence[Pool], order: str) -> Pool:
    """All rows of pools of one length."""
    return Pool(
        np.concatenate([pool.tokens for pool in pools]),
        np.concatenate([pool.weights for pool in pools]),
        order,
        tuple(example for pool in pools for example in pool.examples),
    )


def widen(pool: Pool, length: int, pad_id: int) -> Pool:
    """The same rows with padding up to `length` tokens."""
    more = length - pool.tokens.shape[1]
    if more <= 0:
        return pool
    beside = ((0, 0), (0, more))
    return dataclasses.replace(
        pool,
        tokens=np.pad(pool.tokens, beside, constant_values=pad_id),
        weights=np.pad(pool.weights, beside),
    )


def take(pool: Pool, rows: int | np.ndarray) -> Pool:
    """The first `rows` rows (0: all), or the rows with the given indices."""
    if isinstance(rows, int):
        if rows < 0:
            raise errors.UserError(
                f"{rows} rows of {pool.order!r} are asked for; 0 stands for all."
            )
        if rows > len(pool):
            raise errors.UserError(
                f"{rows} rows of {pool.order!r} are asked for, but there are "
                f"{len(pool)}; lower the data.*_count or sample_count."
            )
        rows = np.arange(rows or len(pool))
    return Pool(
        pool.tokens[rows],
        pool.weights[rows],
        pool.order,
        tuple(pool.examples[i] for i in rows),
    )


def distinct(pool: Pool) -> Pool:
    """The first row of every prompt."""
    first = {e.key: i for i, e in reversed(list(enumerate(pool.examples)))}
    return take(pool, np.array(sorted(first.values()), int))


def prompt_keys(examples: Iterable[data_examples.Example]) -> frozenset[str]:
    """What identifies the prompts of `examples`."""
    return frozenset(example.key for example in examples)


def overlap(seen: frozenset[str], heldout: Sequence[data_examples.Example]) -> int:
    """Number of held-out examples whose prompt is among `seen`, by key."""
    return sum(example.key in seen for example in heldout)


def digest(pool: Pool) -> str:
    """Sixteen hex digits of the token ids and weights."""
    hashed = hashlib.sha256(pool.tokens.tobytes())
    hashed.update(pool.weights.tobytes())
    return hashed.hexdigest()[:16]
