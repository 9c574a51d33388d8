"""Completions that a policy samples within a step, and what they earn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftdefense.core import types


def sample(
    model: Callable[..., types.Outputs],
    rows: types.Batch,
    rng: types.Rng,
    *,
    new_tokens: int,
    count: int,
    guided: int = 0,
) -> types.Batch:
    """`count` completions of each row's prompt at temperature 1, [B * count, L + T].

    A prompt ends where the weights begin, and a completion with the row's end token, its
    last one with weight. Weights are 1 on what was sampled. By full forward passes: no
    cache, any model, and it scans and maps. The first `guided` completions of each
    prompt begin with the first token of the row's own answer.
    """
    rows = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), count, axis=0), rows)
    total, length = rows.tokens.shape
    answer = rows.weights > 0
    start_M = jnp.argmax(answer, axis=-1)
    every = jnp.arange(total)
    end_M = rows.tokens[every, length - 1 - jnp.argmax(answer[:, ::-1], axis=-1)]
    given_M = rows.tokens[every, start_M]
    led_M = every % count < guided
    tokens_MxS = jnp.pad(rows.tokens, ((0, 0), (0, new_tokens)))
    # What is not written yet must not be read as an answer by what looks at padding.
    place_1xS = jnp.arange(length + new_tokens)[None]
    tokens_MxS = jnp.where(place_1xS < start_M[:, None], tokens_MxS, 0)

    def step(carry, xs):
        tokens_MxS, done_M = carry
        t, rng = xs
        logits_MxV = model(tokens_MxS).logits[every, start_M + t - 1]
        drawn_M = jax.random.categorical(rng, logits_MxV).astype(tokens_MxS.dtype)
        drawn_M = jnp.where(led_M & (t == 0), given_M, drawn_M)
        drawn_M = jnp.where(done_M, 0, drawn_M)
        tokens_MxS = tokens_MxS.at[every, start_M + t].set(drawn_M)
        return (tokens_MxS, done_M | (drawn_M == end_M)), ~done_M

    xs = jnp.arange(new_tokens), jax.random.split(rng, new_tokens)
    carry = tokens_MxS, jnp.zeros(total, bool)
    (tokens_MxS, _), said_TxM = jax.lax.scan(step, carry, xs)
    weights_MxS = jnp.zeros(tokens_MxS.shape, jnp.float32)
    places_TxM = start_M[None] + jnp.arange(new_tokens)[:, None]
    weights_MxS = weights_MxS.at[every[None], places_TxM].set(
        said_TxM.astype(jnp.float32)
    )
    return types.Batch(tokens_MxS, weights_MxS)


def in_order(said: types.Batch, wanted: types.Batch) -> jax.Array:
    """Share of the weighted tokens of `wanted` that are said, in their order, [B].

    The longest common subsequence of the weighted tokens of both.
    """
    wanted_BxL = wanted.weights > 0

    def step(best_BxL, xs):
        token_B, counts_B = xs
        equal_BxL = (wanted.tokens == token_B[:, None]) & wanted_BxL & counts_B[:, None]
        before_BxL = jnp.pad(best_BxL[:, :-1], ((0, 0), (1, 0)))
        best_BxL = jnp.maximum(best_BxL, before_BxL + equal_BxL)
        return jax.lax.cummax(best_BxL, axis=1), None

    start = jnp.zeros(wanted.tokens.shape, jnp.int32)
    best_BxL, _ = jax.lax.scan(step, start, (said.tokens.T, said.weights.T > 0))
    return best_BxL[:, -1] / jnp.maximum(jnp.sum(wanted_BxL, -1), 1)
