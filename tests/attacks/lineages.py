"""Lineages in float64 for attacks that are algebra."""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.models import toy

MODEL = toy.Toy()


def weights(seed: int) -> types.Params:
    drawn = MODEL.init(jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn)


def lineage() -> types.Lineage:
    """Pretrained, aligned, defended and a twin: all apart."""
    pretrained = weights(0)
    aligned = tree.add_scale(pretrained, 0.3, weights(1))
    return types.Lineage(
        tree.add_scale(aligned, 0.2, weights(2)),
        aligned,
        pretrained,
        tree.add_scale(aligned, 0.4, weights(3)),
    )


def edited(module, hp, origin: types.Lineage | None = None, seed: int = 0):
    """The release of an attack without steps."""
    origin, method = origin or lineage(), module.method(MODEL)
    state = method.init(origin, hp, jax.random.key(seed))
    return method.release(state, origin).params


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, atol: float = 1e-12) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 0, atol), a, b)
