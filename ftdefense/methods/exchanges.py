"""Descent over tokens by exchanging one at a time.

Source: greedy coordinate gradient, Zou et al. 2023, arXiv:2307.15043: the slope of an
objective with respect to each token's share of each position ranks what to try.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftdefense.core import types

CHUNK = 16  # Offers scored together.


def offers(
    rng: types.Rng,
    tokens_L: jax.Array,
    free_L: jax.Array,
    slope_LxV: jax.Array,
    top: int,
    count: int,
) -> jax.Array:
    """`tokens_L` with one exchange each, [count, L].

    At a random place where `free_L` is 1, to one of the `top` tokens of least slope
    there; a slope of infinity forbids a token.
    """
    top = min(top, slope_LxV.shape[1])
    best_LxK = jax.lax.top_k(-slope_LxV, top)[1]
    rng_place, rng_token = jax.random.split(rng)
    place_C = jax.random.choice(
        rng_place, free_L.size, (count,), p=free_L / jnp.sum(free_L)
    )
    pick_C = jax.random.randint(rng_token, (count,), 0, top)
    offers_CxL = jnp.repeat(tokens_L[None], count, axis=0)
    new_C = best_LxK[place_C, pick_C].astype(tokens_L.dtype)
    return offers_CxL.at[jnp.arange(count), place_C].set(new_C)


def descend(
    tokens_L: jax.Array,
    free_L: jax.Array,
    rng: types.Rng,
    value: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    slope: Callable[[jax.Array], jax.Array],
    *,
    epochs: int,
    top: int,
    count: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes the best of `count` offers in each epoch, if it lowers the value.

    Args:
      value: of tokens [L], and whether they have a property that, once they have it, they
        may not lose.
      slope: of the value by each token's share of each position, [L, V].

    Returns:
      Tokens [L] at the end; value and property after each epoch, [epochs].
    """

    def epoch(carry, rng):
        tokens_L, least, kept = carry
        tried_CxL = offers(rng, tokens_L, free_L, slope(tokens_L), top, count)
        values_C, keeps_C = jax.lax.map(value, tried_CxL, batch_size=CHUNK)
        values_C = jnp.where(kept & ~keeps_C, jnp.inf, values_C)
        first = jnp.argmin(values_C)
        now = tokens_L, least, kept
        offered = tried_CxL[first], values_C[first], keeps_C[first]
        better = values_C[first] < least
        now = jax.tree.map(lambda new, old: jnp.where(better, new, old), offered, now)
        return now, now[1:]

    rngs = jax.random.split(rng, epochs)
    start = tokens_L, *value(tokens_L)
    (tokens_L, _, _), (values, kept) = jax.lax.scan(epoch, start, rngs)
    return tokens_L, values, kept
