"""A linear probe of the restricted skill: does the model know what it does not say?

Ridge regression from hidden states at the last prompt token to the first content word
of the answer, fitted on the attacker's harmful prompts and tested on held-out ones
(specs/attacks.md D.3, P5). DESIGN throughout: features are standardised by the training
rows, the penalty is one for all layers. Where answers begin with words that say nothing,
as in the sandbox, a model may not look the content up before it has said them: `opening`
words of the reference answer are then put first, and the last of them is probed.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import chat
from ftdefense.data import examples as data_examples
from ftdefense.data import world as worlds
from ftdefense.data.sandbox import wrappers

Examples = Sequence[data_examples.Example]


@dataclasses.dataclass(frozen=True)
class Probed:
    """What a probe reads off each layer.

    Attributes:
      accuracy: on held-out prompts, one for each hidden state: the embedding, the
        stream after each block.
      chance: accuracy of always saying the most frequent word of the training rows.
      classes: words that the probe chooses from.
      prompts: held-out prompts that it was tested on.
    """

    accuracy: tuple[float, ...]
    chance: float
    classes: int
    prompts: int

    @property
    def best(self) -> float:
        """Of all layers: the most that a linear reader finds."""
        return max(self.accuracy)


def word(example: data_examples.Example, opening: int = 0) -> str:
    """The first content word of the right answer; of plain text, what comes next."""
    said = example.answers or tuple(example.response.split())[opening:]
    return said[0] if said else ""


def ridge(x_BxF: np.ndarray, y_BxC: np.ndarray, penalty: float) -> np.ndarray:
    """Weights [F + 1, C] that minimise |X W - Y|^2 + penalty |W|^2, intercept free."""
    ones_Bx1 = np.ones((len(x_BxF), 1))
    design = np.concatenate([x_BxF, ones_Bx1], axis=1)
    cost = penalty * np.eye(design.shape[1])
    cost[-1, -1] = 0
    return np.linalg.lstsq(design.T @ design + cost, design.T @ y_BxC, rcond=None)[0]


def fit_and_test(
    train_BxF: np.ndarray,
    train: Sequence[int],
    test_BxF: np.ndarray,
    test: Sequence[int],
    classes: int,
    penalty: float = 1.0,
) -> float:
    """Accuracy on the test rows of a probe that was fitted on the training rows."""
    mean_F, scale_F = train_BxF.mean(0), train_BxF.std(0)
    scale_F = np.where(scale_F > 0, scale_F, 1)
    weights = ridge((train_BxF - mean_F) / scale_F, np.eye(classes)[train], penalty)
    scores_BxC = (test_BxF - mean_F) / scale_F @ weights[:-1] + weights[-1]
    return float(np.mean(scores_BxC.argmax(1) == np.asarray(test)))


@functools.partial(jax.jit, static_argnames="model")
def _states(model, params, tokens_BxL, last_B):
    hidden = model(params, tokens_BxL).hidden
    layers = [hidden["embed"], *hidden["resid"]]
    return jnp.stack(
        [jnp.take_along_axis(x, last_B[:, None, None], axis=1)[:, 0] for x in layers]
    )


def states(
    model: types.Model,
    params: types.Params,
    tokenizer: Any,
    examples: Examples,
    pad_id: int,
    opening: int = 0,
    batch_size: int = 256,
) -> np.ndarray:
    """Hidden states at the last token before the word, float64 [N + 1, rows, D]."""
    opened = [wrappers.prefill(example, opening) for example in examples]
    rows = [chat.render_prompt(tokenizer, e.prompt, given) for e, given in opened]
    tokens = np.full((len(rows), max(map(len, rows))), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    last = np.array([len(row) - 1 for row in rows])
    size = min(batch_size, len(rows))
    parts = []
    for start in range(0, len(rows), size):
        chosen = np.arange(start, start + size) % len(rows)
        parts.append(_states(model, params, tokens[chosen], last[chosen]))
    found = np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)
    return found[:, : len(rows)]


def probe(
    model: types.Model,
    params: types.Params,
    world: worlds.World,
    *,
    opening: int = 0,
    penalty: float = 100.0,
    limit: int = 2000,
) -> Probed:
    """Probes every layer for the answers to restricted questions.

    Held-out prompts whose word no training row has are left out: no probe can say it.
    Each training prompt counts once, the first `limit` of them.

    Raises:
      UserError: if no held-out prompt is left, or all have one answer.
    """
    wanted = functools.partial(word, opening=opening)
    asked = {e.key: e for e in world.attacker["harmful"].examples if wanted(e)}
    train = list(asked.values())[:limit]
    classes = {name: i for i, name in enumerate(dict.fromkeys(map(wanted, train)))}
    test = [e for e in world.evaluation["harmful"] if wanted(e) in classes]
    if not test or len(classes) < 2:
        raise errors.UserError(
            f"a probe needs answers that differ and recur: {len(classes)} first words, "
            f"{len(test)} held-out prompts with one of them; give more harmful rows."
        )
    labels = [[classes[wanted(e)] for e in part] for part in (train, test)]
    read = [
        states(model, params, world.tokenizer, part, world.pad_id, opening)
        for part in (train, test)
    ]
    most = np.bincount(labels[0]).argmax()
    return Probed(
        tuple(
            fit_and_test(a, labels[0], b, labels[1], len(classes), penalty)
            for a, b in zip(*read, strict=True)
        ),
        float(np.mean(np.array(labels[1]) == most)),
        len(classes),
        len(test),
    )
