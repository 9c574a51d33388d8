"""Where arrays live: logical axis names by path, and a rule table to mesh axes.

Parameters, LoRA factors, gradients and optimizer states share the ends of their paths
(module name, leaf name), so one table serves them all. Nothing below knows of a model.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ftdefense.core import errors
from ftdefense.core import tree

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis; what is absent is replicated.
Rules = Mapping[str, str]
RULES: Rules = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
}

# (in, out) of the kernel of each module. The stacked axis comes before them.
_KERNELS = {
    "q": ("embed", "heads"),
    "k": ("embed", "heads"),
    "v": ("embed", "heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}


def mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of data x fsdp x tensor devices; the first ones, or those given.

    Raises:
      UserError: if there are too few.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, fsdp, tensor)
    if min(shape) < 1 or math.prod(shape) > len(devices):
        raise errors.UserError(
            f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not fit on "
            f"{len(devices)} devices; lower one of them."
        )
    chosen = np.array(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def logical_axes(params: Any) -> Any:
    """A tuple of axis names (or None) for each leaf of a tree of arrays.

    Works on parameters, LoRA factors and optimizer states alike; what it does not
    know (scalars, counters, keys) gets no names and is replicated.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _names(tree.path_names(path), leaf.ndim), params
    )


def _names(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    module, leaf = ("", *path)[-2:]
    kernel = _KERNELS.get(module)
    if leaf == "embedding":
        names: tuple[str | None, ...] = ("vocab", "embed")
    elif kernel and leaf == "kernel":
        names = kernel
    elif kernel and leaf == "a":
        names = (kernel[0], None)
    elif kernel and leaf == "b":
        names = (None, kernel[1])
    elif kernel and leaf == "bias":
        names = kernel[1:]
    elif leaf == "scale":
        # A norm's scale is too small to be worth gathering.
        names = (None,)
    else:
        return (None,) * ndim
    if "layers" in path:
        names = ("layers", *names)
    if ndim < len(names):
        # A factored or scalar statistic under a parameter's name.
        return (None,) * ndim
    # Axes that a sweep or a trajectory put in front.
    return (None,) * (ndim - len(names)) + names


def shardings(params: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A `NamedSharding` for each leaf, as `jax.device_put` and `jit` take them.

    An axis that its mesh axis does not divide evenly is replicated.
    """

    def place(leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        spec = [rules.get(name) if name is not None else None for name in names]
        spec = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, params, logical_axes(params))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data and fsdp together, behind `leading` axes that stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))


class Placement:
    """Puts a stage's arrays on a mesh; `jit` then computes where they are."""

    def __init__(self, mesh: Mesh, rules: Rules = RULES):
        self._mesh, self._rules = mesh, rules

    def parameters(self, params: Any) -> Any:
        """Parameters, factors or a whole training state, by the rules."""
        return jax.device_put(params, shardings(params, self._mesh, self._rules))

    def shapes(self, shapes: Any) -> Any:
        """ShapeDtypeStructs of parameters, with where each is to lie."""
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=where
            ),
            shapes,
            shardings(shapes, self._mesh, self._rules),
        )

    def constrain(self, arrays: Any) -> Any:
        """As `parameters`, within a jitted function."""
        where = shardings(arrays, self._mesh, self._rules)
        return jax.lax.with_sharding_constraint(arrays, where)

    def batches(self, batches: Any) -> Any:
        """Arrays [..., B, L], B over data and fsdp together.

        Raises:
          UserError: if B is no multiple of their product.
        """
        parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]

        def place(leaf: Any) -> jax.Array:
            rows = leaf.shape[-2]
            if rows % parts:
                raise errors.UserError(
                    f"--mesh spreads batches over {parts} devices, which does not divide "
                    f"a batch of {rows} rows; set defense.batch_size and "
                    "attack.batch_size to multiples of it."
                )
            return jax.device_put(leaf, batch_sharding(self._mesh, leaf.ndim - 2))

        return jax.tree.map(place, batches)


def beside(params: Any, rows: Any) -> Any:
    """Arrays [B, ...], B spread over the mesh on which `params` lie.

    As they were, where there is no mesh, or B is no multiple of its parts.
    """
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(where, NamedSharding) or where.mesh.axis_names != AXES:
        return rows
    parts = where.mesh.shape["data"] * where.mesh.shape["fsdp"]
    spread = batch_sharding(where.mesh)
    return jax.tree.map(
        lambda x: jax.device_put(x, spread) if x.shape[0] % parts == 0 else x, rows
    )


def parse(text: str) -> dict[str, int]:
    """`fsdp=4,tensor=2` as the arguments of `mesh`.

    Raises:
      UserError: for another axis, or no number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit():
            raise errors.UserError(
                f"--mesh={text}: expected sizes of {', '.join(AXES)}, as fsdp=4,tensor=2."
            )
        sizes[axis] = int(size)
    return sizes
