"""The logit lens: cross-entropy read out of every hidden state, and where it counts.

RepNoise and SEAM share it. Hidden states are numbered as in Hugging Face: 0 is the
embedding, l the output of block l, N the last one after the last norm.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import losses
from ftdefense.objectives import preferences

MASKS = ("divergence", "response")


class Targets(NamedTuple):
    """Which predictions count; all arrays [B, L - 1], aligned with the targets."""

    tokens: jax.Array
    weights: jax.Array
    read: jax.Array  # Logits are multiplied by it: a 0 leaves a uniform prediction.


def divergence(batch: types.Batch, pair: types.Batch) -> jax.Array:
    """1 where the tokens of paired rows differ, padding included, else 0; [B, L].

    Raises:
      UserError: if rows are without a partner.
    """
    preferences.check_pairs(batch, pair)
    return (jnp.asarray(batch.tokens) != pair.tokens).astype(jnp.float32)


def targets(batch: types.Batch, pair: types.Batch, mask: str) -> Targets:
    """What the cross-entropy of `batch` asks for.

    `divergence` follows the published code with its quirks: logits are multiplied by
    the mask of their own position and targets by that of theirs, so the first
    diverging token of a row costs ln V without a gradient; a target of id 0 counts as
    ignored. `response` is the correction: the batch's own weights, all logits read.
    """
    tokens = jnp.asarray(batch.tokens)[:, 1:]
    if mask == "response":
        return Targets(tokens, batch.weights[:, 1:], jnp.ones(tokens.shape))
    if mask != "divergence":
        raise errors.unknown("mask", mask, MASKS)
    mask_BxL = divergence(batch, pair)
    return Targets(tokens, mask_BxL[:, 1:] * (tokens != 0), mask_BxL[:, :-1])


def cross_entropy(logits_BxLxV: jax.Array, asked: Targets) -> jax.Array:
    """Nats per target that counts; 0 if none does."""
    read_BxLx1 = asked.read.astype(logits_BxLxV.dtype)[..., None]
    nats_BxL = losses.cross_entropy(logits_BxLxV[:, :-1] * read_BxLx1, asked.tokens)
    weights_BxL = asked.weights.astype(nats_BxL.dtype)
    total, weight = jnp.sum(nats_BxL * weights_BxL), jnp.sum(weights_BxL)
    return losses.average(total, weight)


def hidden_states(outputs: types.Outputs) -> jax.Array:
    """All N + 1 hidden states [N + 1, B, L, D] in Hugging Face's order."""
    hidden = outputs.hidden
    inner_NxBxLxD = hidden["resid"][:-1]
    ends = [hidden[name][None] for name in ("embed", "final")]
    return jnp.concatenate([ends[0], inner_NxBxLxD, ends[1]])


def ascent(
    readout: Callable[..., jax.Array],
    params: types.Params,
    outputs: types.Outputs,
    asked: Targets,
) -> jax.Array:
    """`1 + (CE_final + sum_l CE_l) / (N + 1)`, l = 0 .. N: what RepNoise ascends.

    The code's quirks are kept: N + 2 terms are divided by N + 1, and the readout norms
    the last hidden state again. Each layer's logits are recomputed on the way back, so
    that only one layer's [B, L, V] is alive.
    """
    states_NxBxLxD = hidden_states(outputs)

    @jax.checkpoint
    def add(total, hidden_BxLxD):
        return total + cross_entropy(readout(params, hidden_BxLxD), asked), None

    total, _ = jax.lax.scan(add, cross_entropy(outputs.logits, asked), states_NxBxLxD)
    return 1 + total / states_NxBxLxD.shape[0]


def chosen(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Sorted indices of hidden states; those above the last, `count`, mean the last.

    Raises:
      UserError: if there are none, or one is negative.
    """
    if not layers or min(layers) < 0:
        raise errors.UserError(
            f"layers={layers}: give indices of hidden states, 0 (the embedding) to "
            f"{count} (the last, normed)."
        )
    return tuple(sorted({min(layer, count) for layer in layers}))
