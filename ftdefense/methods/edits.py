"""What edits of finished weights share: the origins they need, the kernels they change."""

from collections.abc import Mapping
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types

Path = tuple[str, ...]

_PROVIDERS = {
    "aligned": "the weights before fine-tuning; run it with --threat=service",
    "pretrained": "the weights before alignment; give them with --pretrained=FOLDER",
}


def require(name: str, lineage: types.Lineage, needs: Sequence[str]) -> None:
    """Refuses a lineage without the weights in `needs`: `aligned`, `pretrained`."""
    for weights in needs:
        if getattr(lineage, weights) is None:
            raise errors.UserError(f"{name} needs {_PROVIDERS[weights]}.")


def kernels(params: types.Params, targets: Sequence[str]) -> dict[Path, jax.Array]:
    """Stacked kernels [N, I, O] of the blocks' modules named in `targets`, by path.

    Raises:
      UserError: if there are none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {tree.path_names(path): leaf for path, leaf in leaves}
    named = {p: x for p, x in named.items() if p[-1] == "kernel" and x.ndim == 3}
    chosen = {path: x for path, x in named.items() if path[-2] in targets}
    if not chosen:
        known = sorted({path[-2] for path in named})
        raise errors.UserError(
            f"targets {tuple(targets)} match no kernel; set targets to some of {known}."
        )
    return chosen


def replace(params: types.Params, new: Mapping[Path, jax.Array]) -> types.Params:
    """A copy of `params` with the leaves of `new` in their places."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.copy(new.get(tree.path_names(path), x)), params
    )


def difference(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x - y` in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.astype(wide) - y.astype(wide)
