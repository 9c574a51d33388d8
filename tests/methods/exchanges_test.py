"""Exchanges of tokens: what is offered, and what is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.methods import exchanges

KEY = jax.random.key(0)
TOKENS = jnp.array([4, 1, 3, 0])
FREE = jnp.array([0.0, 1.0, 1.0, 0.0])
SLOPE = jax.random.normal(KEY, (4, 6))


def test_offers_are_single_exchanges_among_the_best():
    """Catches a place that is not free, the largest slopes, and a token outside `top`."""
    found = np.asarray(exchanges.offers(KEY, TOKENS, FREE, SLOPE, top=2, count=200))
    best = np.argsort(np.asarray(SLOPE), axis=-1)[:, :2]
    places = set()
    for row in found:
        (changed,) = np.nonzero(row != TOKENS)
        assert len(changed) <= 1
        for place in changed:
            assert FREE[place] == 1 and row[place] in best[place]
            places.add(int(place))
    assert places == {1, 2}


def distance(tokens):
    """To all fives; less than two of them may not be lost."""
    return jnp.sum(5 - tokens).astype(jnp.float32), jnp.sum(tokens == 5) >= 2


def descended(tokens, value=distance, **options):
    slope = jnp.broadcast_to(-jnp.arange(6.0), (4, 6))
    options = {"epochs": 30, "top": 3, "count": 4, **options}
    return exchanges.descend(
        tokens, jnp.ones(4), KEY, value, lambda _: slope, **options
    )


def test_descends_to_the_optimum():
    """Catches the worst offer, and a value that rises."""
    tokens, values, kept = descended(TOKENS)
    np.testing.assert_array_equal(tokens, [5, 5, 5, 5])
    assert np.all(np.diff(values) <= 0) and values[-1] == 0 and kept[-1]


@pytest.mark.parametrize("first", [True, False])
def test_what_is_had_is_not_lost(first):
    """Descent would lead to zeros. Catches an offer that loses the property, and one
    that is refused before anything was had.
    """

    def value(tokens):
        return jnp.sum(tokens).astype(jnp.float32), jnp.sum(tokens == 3) >= 1

    start = jnp.array([3 if first else 4, 4, 4, 4])
    slope = jnp.broadcast_to(jnp.arange(6.0), (4, 6))
    tokens, _, kept = exchanges.descend(
        start, jnp.ones(4), KEY, value, lambda _: slope, epochs=40, top=3, count=4
    )
    assert kept.all() == first
    np.testing.assert_array_equal(np.sort(tokens), [0, 0, 0, 3 if first else 0])
