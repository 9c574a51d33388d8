"""L1 and L2: what lies between a release and attacked weights.

Every point is evaluated on the same fixed batches, none is interpolated. Updates are
differences of merged weights, (alpha / r) A B of an adapter: its random factors alone
would fill most of the axis (specs/artifacts.md 5.3).
"""

from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.audit.diagnostics import findings
from ftdefense.audit.diagnostics import gradients
from ftdefense.core import tree
from ftdefense.core import types

Finding = findings.Finding
Loss = gradients.Loss
BARRIER = gradients.BARRIER  # DESIGN, in nats per token.
PATH_POINTS, PLANE_POINTS = 21, 30
MARGIN = 0.25  # Of the plane's extent, on each side.


def update(attacked: types.Params, release: types.Params) -> types.Params:
    """What an attack has added to a release, in float32 or wider: adapters merged."""
    return tree.add_scale(tree.wide(attacked), -1.0, release)


@functools.partial(jax.jit, static_argnames="loss")
def _points(loss: Loss, origin, axes, places_PxA, data) -> jax.Array:
    """Losses [P] at origin + sum_a place_a * axis_a, one after another."""

    def at(place_A):
        moved = jax.tree.map(
            lambda x, *along: (
                x + sum(p * a for p, a in zip(place_A, along, strict=True))
            ),
            origin,
            *axes,
        )
        return loss(moved, *data)

    return jax.lax.map(at, places_PxA)


def evaluate(
    loss: Loss, origin: types.Params, axes: tuple[Any, ...], places: Any, *data: Any
) -> np.ndarray:
    """Losses at points of the space that `axes` span from `origin`."""
    places = jnp.asarray(np.asarray(places, np.float64))
    return np.asarray(_points(loss, tree.wide(origin), tuple(axes), places, data))


class Path(NamedTuple):
    """Losses on the line from a release (t = 0) to attacked weights (t = 1)."""

    t: np.ndarray
    harmful: np.ndarray
    benign: np.ndarray

    @property
    def joint(self) -> np.ndarray:
        return self.harmful + self.benign


def path(
    loss: Loss,
    release: types.Params,
    attacked: types.Params,
    harmful: Any,
    benign: Any,
    points: int = PATH_POINTS,
) -> Path:
    """L_h and L_c along the straight line."""
    t = np.linspace(0, 1, points)
    way = (update(attacked, release),)
    found = [
        evaluate(loss, release, way, t[:, None], data) for data in (harmful, benign)
    ]
    return Path(t, *found)


def barrier(values: np.ndarray) -> float:
    """max over the path - max of its ends: 0 if an end is the highest point."""
    return float(np.max(values) - max(values[0], values[-1]))


def linear_path(line: Path, attack_failed: bool) -> Finding:
    """L1: no barrier, yet the gradient attack failed."""
    height = barrier(line.harmful)
    note = f"joint barrier {barrier(line.joint):.3g}"
    return Finding("L1", height, BARRIER, height <= BARRIER and attack_failed, note)


class Plane(NamedTuple):
    """Losses on the plane of two updates, and where on it the attacks ended.

    Attributes:
      x, y: coordinates [n] along the first update, and across it, in units of L2.
      harmful, benign: losses [n, n], rows along y; `joint` is their sum.
      points: {name: (x, y)} of the release and of both attacks; exact.
      losses: {name: (L_h, L_c)} there, on the same batches.
    """

    x: np.ndarray
    y: np.ndarray
    harmful: np.ndarray
    benign: np.ndarray
    points: Mapping[str, tuple[float, float]]
    losses: Mapping[str, tuple[float, float]]

    @property
    def joint(self) -> np.ndarray:
        return self.harmful + self.benign


def orthonormal(first: types.Params, second: types.Params) -> tuple[Any, Any]:
    """Gram-Schmidt over all leaves together; the second is 0 if they are parallel."""
    one = tree.norm(first)
    e1 = jax.tree.map(lambda a: tree.wide(a) / jnp.where(one > 0, one, 1), first)
    rest = tree.add_scale(tree.wide(second), -tree.dot(second, e1), e1)
    # Once more: what rounding left of e1 would tilt the plane.
    rest = tree.add_scale(rest, -tree.dot(rest, e1), e1)
    left = tree.norm(rest)
    real = left > 1e-6 * tree.norm(second)
    return e1, jax.tree.map(
        lambda a: jnp.where(real, a / jnp.where(real, left, 1), 0), rest
    )


def plane(
    loss: Loss,
    release: types.Params,
    naive: types.Params,
    adaptive: types.Params,
    harmful: Any,
    benign: Any,
    points: int = PLANE_POINTS,
) -> Plane:
    """L_h and L_c on the plane through a release and two attacked models."""
    first, second = update(naive, release), update(adaptive, release)
    axes = orthonormal(first, second)

    def place(way):
        return tuple(float(tree.dot(way, axis)) for axis in axes)

    ends = {"release": (0.0, 0.0), "naive": place(first), "adaptive": place(second)}
    x, y = (_extent([end[i] for end in ends.values()], points) for i in range(2))
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    places = np.concatenate([grid, np.array(list(ends.values()))])
    found = [
        evaluate(loss, release, axes, places, data).astype(np.float64)
        for data in (harmful, benign)
    ]
    shaped = [values[: len(grid)].reshape(points, points) for values in found]
    there = [values[len(grid) :] for values in found]
    at = {name: (float(h), float(c)) for name, h, c in zip(ends, *there, strict=True)}
    return Plane(x, y, *shaped, ends, at)


def _extent(values: list[float], points: int) -> np.ndarray:
    low, high = min(values), max(values)
    margin = MARGIN * ((high - low) or 1.0)
    return np.linspace(low - margin, high + margin, points)


def success_region(surface: Plane, harmful: float, benign: float) -> Finding:
    """L2: points with L_h and L_c below both bounds, where neither attack ended.

    The bounds are tau_h and tau_c of the success predicate by losses (1.3, Eq. 1). The
    value is the share of the plane.
    """
    inside = (surface.harmful <= harmful) & (surface.benign <= benign)
    reached = [
        name
        for name in ("naive", "adaptive")
        if surface.losses[name][0] <= harmful and surface.losses[name][1] <= benign
    ]
    share = float(inside.mean())
    note = f"reached by {' and '.join(reached) or 'neither'}"
    return Finding("L2", share, 0.0, share > 0 and not reached, note)
