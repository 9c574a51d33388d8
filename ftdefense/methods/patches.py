"""Low-rank patches of kernels, on top of whatever trains."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters


def find(params: types.Params, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Paths of the stacked kernels that have one of `names`, by name.

    Raises:
      UserError: if there is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    kernels = [tree.path_names(path) for path, leaf in leaves if leaf.ndim == 3]
    paths = {path[-2]: ("layers", *path[:-1]) for path in sorted(kernels)}
    found = {name: path for name, path in paths.items() if name in names}
    if not found:
        raise errors.UserError(
            f"targets {names} match no kernel of a layer; choose some of "
            f"{sorted(paths)}."
        )
    return found


def at(nested: types.Params, path: tuple[str, ...]) -> Any:
    """What lies at `path`."""
    return functools.reduce(lambda inner, name: inner[name], path, nested)


def nest(flat: dict[tuple[str, ...], Any]) -> types.Params:
    """{path: value} as nested dicts."""
    nested: dict[str, Any] = {}
    for (*outer, last), value in flat.items():
        inner = nested
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested


def apply(ctx: types.Context, params: types.Params, patch: types.Params) -> Callable:
    """`model(tokens, rng=None)` of `params` where `patch` adds `(x a) b` to its kernels.

    Args:
      params: what trains.
      patch: factors {a [N, in, R], b [N, R, out]} at paths of kernels.
    """
    adapter = ctx.hp.adapter
    if not isinstance(adapter, adapters.LoRA):
        # Without an adapter `rng` would drop nothing but the patch's own inputs.
        return lambda tokens, rng=None: ctx.model(params, tokens, lora=patch)
    # Bound to an adapter, the model multiplies every `a` by its scale.
    both = _joined(params, scaled(patch, 1 / adapter.scale()))
    return functools.partial(ctx.model, both)


def scaled(patch: types.Params, factor: Any) -> types.Params:
    """The patch times `factor`."""

    def times(path, leaf):
        return leaf * factor if tree.path_names(path)[-1] == "a" else leaf

    return jax.tree_util.tree_map_with_path(times, patch)


def _joined(factors: types.Params, patch: types.Params) -> types.Params:
    """The sum of two low-rank products, as one of both ranks together."""
    if "a" in factors and "a" in patch:
        return {
            "a": jnp.concatenate([factors["a"], patch["a"]], -1),
            "b": jnp.concatenate([factors["b"], patch["b"]], -2),
        }
    common = {
        name: _joined(factors[name], patch[name]) for name in factors if name in patch
    }
    return {**factors, **patch, **common}
