"""RESTA: the vector, where it starts, DARE, the nulls.

Mutants:
      `edits.difference, lineage.aligned, unaligned` -> `edits.difference, unaligned, lineage.aligned`
      `return types.Lineage(lineage.aligned)` -> `return types.Lineage(lineage.current)`
      `x / (1 - drop), 0` -> `x, 0`
      `rng, x.shape) >= drop` -> `rng, x.shape) < drop`
      `hp.gamma * vector` -> `vector`
      `(thin - whole)` -> `thin`
      `edits.difference, lineage.current, lineage.aligned` -> `edits.difference, lineage.current, unaligned`
      `map(thinned, leaves, rngs)` -> `map(thinned, leaves, [rng] * len(leaves))`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import resta
from ftdefense.methods import lift
from ftdefense.methods import optimizers

from ..conftest import batch
from . import toy_lineage as toys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


HARMFUL = {"harmful": batch(2)}
OPTIMIZER = optimizers.Optimizer(1e-2)


def walked(method, origin, hp, steps=2):
    hp = hp.replace(optimizer=OPTIMIZER.tabulate(steps))
    state, one = method.init(origin, hp, toys.KEY), jax.jit(method.step)
    for _ in range(steps):
        state, _ = one(state, origin, HARMFUL, toys.KEY)
    return state


@functools.cache
def trained():
    """(method, its state after two steps, the harmful model found by plain SFT)."""
    method, origin = resta.method(toys.MODEL), toys.lineage()
    state = walked(method, origin, resta.Hparams())
    sft = lift.supervised(toys.MODEL, "harmful")
    unaligned = walked(sft, types.Lineage(origin.aligned), lift.Hparams()).params
    return method, state, unaligned


def released(**changes):
    method, state, _ = trained()
    hp = state.hp.replace(**changes)
    return method.release(state.replace(hp=hp), toys.lineage()).params


def plus(x, scale, y):
    return jax.tree.map(lambda a, b: a + scale * b, x, y)


def test_nothing_added_nothing_dropped():
    """gamma = drop = 0: the user's bits. Catches a sum that rounds."""
    toys.same(released(gamma=0.0, drop=0.0), toys.lineage().current)


def test_safety_vector():
    """w + gamma (aligned - SFT on harmful from aligned). Catches its sign, its start."""
    origin, (_, _, unaligned) = toys.lineage(), trained()
    vector = plus(origin.aligned, -1.0, unaligned)
    assert tree.norm(vector) > 1e-2
    toys.close(released(gamma=0.7), plus(origin.current, 0.7, vector), rtol=1e-8)


def test_undoes_the_harmful_fine_tuning():
    """A user whose model is the unaligned one gets the aligned one at gamma = 1."""
    origin, (_, _, unaligned) = toys.lineage(), trained()
    harmed = types.Lineage(unaligned, origin.aligned)
    restored = resta.restored(harmed, unaligned, resta.Hparams(gamma=1.0), toys.KEY)
    toys.close(restored, origin.aligned, rtol=1e-12)


def test_all_dropped():
    """drop = 1: aligned + gamma * vector, no NaN. Catches what survives."""
    origin = toys.lineage()
    toys.close(released(gamma=0.0, drop=1.0), origin.aligned, rtol=1e-12)


def test_dare_rescales():
    """Entries are 0 or x / (1 - p), in the right share. Catches a share p for 1 - p."""
    thin = resta.dropped({"w": jnp.full(20000, 3.0)}, 0.3, toys.KEY)["w"]
    np.testing.assert_allclose(jnp.unique(thin), [0.0, 3 / 0.7], rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(thin), 3.0, rtol=0.02)


def test_dare_draws_each_leaf_anew():
    """Catches one mask for all leaves of a shape."""
    thin = resta.dropped({"a": jnp.ones(99), "b": jnp.ones(99)}, 0.5, toys.KEY)
    assert jnp.any(thin["a"] != thin["b"])


def test_dare_thins_the_users_update():
    """Where it drops, the aligned weights; elsewhere the update / (1 - p)."""
    origin = toys.lineage()
    thin = plus(released(gamma=0.0, drop=0.4), -1.0, origin.aligned)
    ratio = jax.tree.map(
        lambda t, user, start: t / (user - start), thin, origin.current, origin.aligned
    )
    for leaf in jax.tree.leaves(ratio):
        full = jnp.abs(leaf - 1 / 0.6) < 1e-6
        assert jnp.all(full | (jnp.abs(leaf) < 1e-6))
        assert 0 < jnp.mean(full) < 1


def test_missing_weights_are_named():
    """Catches a vector from the user's own weights, which would be silent."""
    with pytest.raises(errors.UserError, match="--threat=service"):
        resta.method(toys.MODEL).init(
            types.Lineage(toys.params()), resta.Hparams(OPTIMIZER), toys.KEY
        )
