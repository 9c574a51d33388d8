"""Kullback-Leibler divergences between two models' next tokens, in nats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.objectives import losses

KINDS = ("forward", "reverse")


def kullback_leibler(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis."""
    log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def to_reference(
    model: Callable[..., types.Outputs],
    reference: Callable[..., types.Outputs],
    kind: str = "forward",
    microbatches: int = 1,
) -> Callable[..., jax.Array]:
    """`loss(params, batch, rng=None)`: mean divergence at the weighted positions.

    Args:
      model: (params, tokens, ...) -> Outputs.
      reference: (tokens) -> Outputs; frozen.
      kind: `forward`: KL(reference || model); `reverse`: KL(model || reference).
      microbatches: as in `losses.next_token`.
    """
    p, q = {"forward": (1, 0), "reverse": (0, 1)}[kind]

    def both(params: Any, tokens_BxL: jax.Array, **hooks: Any) -> types.Outputs:
        outputs = model(params, tokens_BxL, **hooks)
        frozen_BxLxV = jax.lax.stop_gradient(reference(tokens_BxL).logits)
        # A pair: stacked, full vocabularies would be held twice.
        return types.Outputs((outputs.logits, frozen_BxLxV), outputs.hidden)

    def token_loss(logits: Any, targets_BxL: jax.Array) -> jax.Array:
        del targets_BxL
        return kullback_leibler(logits[p], logits[q])

    return losses.next_token(both, token_loss, microbatches)
