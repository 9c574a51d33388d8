"""The adapter of embedding rows: what it moves, and what it must not."""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import rows
from ftdefense.models import toy

from ..conftest import batch

MODEL = toy.Toy()
ADAPTER = rows.Rows(first=3, count=2)


def test_fresh_rows_are_the_base():
    """Catches an off-by-one at the first row, and a merge into another place."""
    base = MODEL.init(jax.random.key(0))
    params = ADAPTER.init(base, jax.random.key(1))
    assert params["embed"]["embedding"].shape == (2, 8)
    jax.tree.map(np.testing.assert_array_equal, ADAPTER.merge(params, base), base)
    moved = ADAPTER.merge(jax.tree.map(jnp.zeros_like, params), base)
    table = np.array(base["embed"]["embedding"])
    table[3:5] = 0
    np.testing.assert_array_equal(moved["embed"]["embedding"], table)


def test_gradients_are_those_of_the_rows():
    """Catches a gradient that reads another row, or a stop on the way."""
    base, given = MODEL.init(jax.random.key(0)), batch(0)
    params = ADAPTER.init(base, jax.random.key(1))
    hp = lift.Hparams(adapter=ADAPTER)
    ctx = lift.context(MODEL, types.Lineage(base), hp)
    found = jax.grad(ctx.loss)(params, given)["embed"]["embedding"]
    full = lift.context(MODEL, types.Lineage(base), lift.Hparams())
    whole = jax.grad(full.loss)(base, given)["embed"]["embedding"]
    np.testing.assert_allclose(found, whole[3:5], rtol=1e-5, atol=1e-7)
    hidden = jnp.ones((1, 1, 8))
    np.testing.assert_array_equal(
        ctx.readout(params, hidden), MODEL.readout(base, hidden)
    )


def test_signed_descent_stays_in_its_box():
    """B.14: at most steps * rate, and exactly that if signs agree. Catches Adam."""
    base, given = MODEL.init(jax.random.key(0)), batch(0)
    optimizer = optimizers.Optimizer(1e-3, kind="sign", clip=float("inf"))
    hp = lift.Hparams(optimizer.tabulate(5), ADAPTER)
    method = lift.supervised(MODEL, "user")
    lineage = types.Lineage(base)
    state = method.init(lineage, hp, jax.random.key(1))
    step = jax.jit(method.step)
    for _ in range(5):
        state, _ = step(state, lineage, {"user": given}, jax.random.key(2))
    release = method.release(state, lineage).params
    moved = np.abs(release["embed"]["embedding"] - base["embed"]["embedding"])
    np.testing.assert_allclose(moved[3:5].max(), 5e-3, rtol=1e-3)
    assert not moved[:3].any() and not moved[5:].any()
    jax.tree.map(np.testing.assert_array_equal, release["layers"], base["layers"])
