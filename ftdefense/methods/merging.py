"""Ways to merge the weights of two models, tensor by tensor and layer by layer.

A tensor is a matrix or vector of one layer: leaves under `layers` are stacks of N.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import draws
from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import edits

_WHO = {
    "aligned": "the undefended aligned weights",
    "pretrained": "the weights before alignment; give them with --pretrained=FOLDER",
    "twin": "the undefended model after the same fine-tuning",
}


def require(name: str, lineage: types.Lineage, needs: tuple[str, ...]) -> None:
    """Refuses a lineage without the weights in `needs`."""
    for weights in needs:
        if getattr(lineage, weights) is None:
            raise errors.UserError(f"{name} needs {_WHO[weights]}.")


def map_layers(fn: Callable[..., jax.Array], *trees: Any) -> Any:
    """`fn` of the tensors of equal place, layers apart; results in the first's dtype."""

    def leaf(path, x, *others):
        run = jax.vmap(fn) if "layers" in tree.path_names(path) else fn
        return run(*(tree.wide(a) for a in (x, *others))).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, *trees)


def arithmetic(start: Any, lam: Any, end: Any, origin: Any) -> Any:
    """`start + lam (end - origin)`."""
    return tree.add_scale(start, lam, jax.tree.map(edits.difference, end, origin))


def slerp(start: Any, lam: Any, end: Any) -> Any:
    """Spherical interpolation: the angle grows evenly, the length not quite."""

    def between(x, y):
        a, b = (v / jnp.maximum(tree.norm(v), jnp.finfo(v.dtype).tiny) for v in (x, y))
        angle = 2 * jnp.arctan2(tree.norm(a - b), tree.norm(a + b))
        sine = jnp.sin(angle)
        straight = sine < 1e-5  # Parallel: the formula is 0 / 0, the line is the arc.
        sine = jnp.where(straight, 1, sine)
        near = jnp.where(straight, 1 - lam, jnp.sin((1 - lam) * angle) / sine)
        far = jnp.where(straight, lam, jnp.sin(lam * angle) / sine)
        return near * x + far * y

    return map_layers(between, start, end)


def transplant(start: Any, lam: Any, end: Any, first: Any, last: Any) -> Any:
    """Layers in [first, last), shares of the depth, a share `lam` of the way to `end`."""

    def leaf(path, x, y):
        if "layers" not in tree.path_names(path):
            return jnp.copy(x)
        place_N = (jnp.arange(x.shape[0]) + 0.5) / x.shape[0]
        inside_N = (place_N >= first) & (place_N < last)
        share = jnp.where(inside_N, lam, 0).reshape(-1, *(1,) * (x.ndim - 1))
        return tree.add_scale(x, share, edits.difference(y, x))

    return jax.tree_util.tree_map_with_path(leaf, start, end)


def trim(x: jax.Array, density: Any) -> jax.Array:
    """Keeps a share `density` of the entries, those of largest size."""
    size = jnp.abs(x).ravel()
    cut = jnp.floor((1 - density) * size.size + 1e-4).astype(jnp.int32)
    least = jnp.sort(size)[jnp.clip(cut, 0, size.size - 1)]
    return jnp.where((jnp.abs(x) >= least) & (cut < size.size), x, 0)


def ties(origin: Any, lam: Any, first: Any, second: Any, density: Any) -> Any:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim, elect signs, mean of agreeing."""

    def merged(o, x, y):
        moved = jnp.stack([trim(x - o, density), trim(y - o, density)])
        elected = jnp.sign(jnp.sum(moved, 0))[None]
        agreed = (jnp.sign(moved) == elected) & (moved != 0)
        count = jnp.maximum(jnp.sum(agreed, 0), 1)
        return o + lam * jnp.sum(jnp.where(agreed, moved, 0), 0) / count

    return map_layers(merged, origin, first, second)


def dare(start: Any, lam: Any, end: Any, origin: Any, density: Any, rng: Any) -> Any:
    """DARE (Yu et al. 2023, arXiv:2311.03099): a random share of the move, rescaled."""
    rngs = optax.tree.split_key_like(rng, origin)

    def leaf(x, y, o, rng):
        kept = draws.bernoulli(rng, density, x.shape)
        moved = edits.difference(y, o) / jnp.where(density > 0, density, 1)
        return tree.add_scale(x, lam, jnp.where(kept, moved, 0))

    return jax.tree.map(leaf, start, end, origin, rngs)
