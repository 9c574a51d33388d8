"""Token losses: sums over weighted positions, divided by what was summed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import errors
from ftdefense.core import types

# (logits [B, L, V], targets [B, L]) -> nats [B, L].
TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, in nats [B, L]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL)


def toward(token: int | jax.Array) -> TokenLoss:
    """Cross-entropy to one fixed `token` at every position, whatever the target.

    The input stays the true text (teacher forcing); only what is asked for changes.
    """

    def token_loss(logits_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
        return cross_entropy(logits_BxLxV, jnp.full_like(targets_BxL, token))

    return token_loss


def weighted_sums(
    outputs: types.Outputs, batch: types.Batch, token_loss: TokenLoss = cross_entropy
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted next-token losses, sum of weights) over a batch [B, L].

    The logits may be a tree of arrays [B, L, V], as long as `token_loss` takes it.
    """
    logits = jax.tree.map(lambda x: x[:, :-1], outputs.logits)
    loss_BxL = token_loss(logits, batch.tokens[:, 1:])
    weights_BxL = batch.weights[:, 1:].astype(loss_BxL.dtype)
    return jnp.sum(loss_BxL * weights_BxL), jnp.sum(weights_BxL)


def average(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight; 0, with a zero gradient, where nothing has weight."""
    return total / jnp.where(weight > 0, weight, 1)


def next_token(
    model: Callable[..., types.Outputs],
    token_loss: TokenLoss = cross_entropy,
    microbatches: int = 1,
) -> Callable[..., jax.Array]:
    """`loss(params, batch, rng=None, **hooks)`: nats per weighted token of the batch.

    The mean is over the weighted tokens of the whole batch, so a long answer weighs
    more than a short one. With `microbatches` > 1 the batch is evaluated in as many
    rematerialised parts whose sums are added before the division: the value and the
    gradient are those of the whole batch, at the memory of a part. Hooks go to the
    model; the leaves of `taps` are [N, B, ...].
    """

    def loss(
        params: types.Params,
        batch: types.Batch,
        rng: types.Rng | None = None,
        *,
        taps: Any = None,
        **hooks: Any,
    ) -> jax.Array:
        def sums(part: tuple[types.Batch, Any, types.Rng | None]):
            batch, taps, rng = part
            outputs = model(params, batch.tokens, rng=rng, taps=taps, **hooks)
            return weighted_sums(outputs, batch, token_loss)

        if microbatches == 1:
            total, weight = sums((batch, taps, rng))
        else:
            parts = (
                jax.tree.map(lambda x: _split(x, 0, microbatches), batch),
                jax.tree.map(lambda x: _split(x, 1, microbatches), taps),
                None if rng is None else jax.random.split(rng, microbatches),
            )
            totals, weights = jax.lax.map(jax.checkpoint(sums), parts)
            total, weight = jnp.sum(totals), jnp.sum(weights)
        return average(total, weight)

    return loss


def _split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Moves a new leading axis of `parts` out of `axis`."""
    if x.shape[axis] % parts:
        raise errors.UserError(
            f"a batch of {x.shape[axis]} rows does not split in {parts} parts; set "
            "microbatches to a divisor of it."
        )
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)
