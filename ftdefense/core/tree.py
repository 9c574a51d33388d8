"""Pytree arithmetic that optax.tree lacks; norms in float32 or wider."""

from typing import Any

import jax
import jax.numpy as jnp

# Keeps 0/0 away from a zero gradient; the value of the git-disl code bases.
NORM_EPSILON = 1e-7


def wide(x: Any) -> Any:
    """Every leaf in float32, or as it is if it is wider: steps of 1e-5 are lost below."""
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), x)


def dot(x: Any, y: Any) -> jax.Array:
    """Inner product over all leaves, accumulated in float32 or wider."""
    products = jax.tree.map(lambda a, b: jnp.vdot(wide(a), wide(b)), x, y)
    return jax.tree.reduce(jnp.add, products)


def norm(x: Any) -> jax.Array:
    """L2 norm over all leaves together: of global arrays, also when sharded."""
    return jnp.sqrt(
        jax.tree.reduce(
            jnp.add, jax.tree.map(lambda a: jnp.sum(jnp.square(wide(a))), x)
        )
    )


def normalize(x: Any) -> Any:
    """`x / (norm(x) + 1e-7)` in float32 or wider: length one, or zero if `x` is."""
    scale = 1.0 / (norm(x) + NORM_EPSILON)
    return jax.tree.map(lambda a: wide(a) * scale, x)


def add_scale(x: Any, scale: Any, y: Any) -> Any:
    """`x + scale * y` leafwise, rounded once, to the dtype of `x`."""
    return jax.tree.map(lambda a, b: (wide(a) + scale * wide(b)).astype(a.dtype), x, y)


def cosine(x: Any, y: Any) -> jax.Array:
    """Cosine of the angle between two trees; 0 if either vanishes."""
    lengths = norm(x) * norm(y)
    return jnp.where(lengths > 0, dot(x, y) / jnp.where(lengths > 0, lengths, 1), 0.0)


def size(x: Any) -> int:
    """Number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(x))


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path of `jax.tree_util` as plain strings."""
    return tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
