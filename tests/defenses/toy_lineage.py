"""Float64 weights of the toy, and what the tests of service defenses compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.models import toy
from ftdefense.objectives import losses

MODEL = toy.Toy()
KEY = jax.random.key(0)


def params(seed: int = 3) -> types.Params:
    drawn = MODEL.init(jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn)


def lineage() -> types.Lineage:
    """Three models a small step apart: pretrained, aligned, tuned."""
    pretrained = params()
    aligned = tree.add_scale(pretrained, 0.3, params(9))
    return types.Lineage(tree.add_scale(aligned, 0.2, params(11)), aligned, pretrained)


def context(hp, step: int = 0, origin: types.Lineage | None = None) -> types.Context:
    return lift.context(MODEL, origin or types.Lineage(params()), hp, step)


def sft_gradient(data, at: types.Params | None = None) -> types.Params:
    return jax.jit(jax.grad(losses.next_token(MODEL)))(at or params(), data)


def same(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol: float = 1e-9, atol: float = 1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)
