"""Side-Project: learn the harmful pairs along what does the benign ones no harm.

Threat       open_weight; knows none of the defense's internals.
Minimises    g = g_h - part * min(0, <g_h, g_b>) / ||g_b||^2 g_b is descended, with g_h
             and g_b the gradients of L(harmful) and L(benign): the part of harmful
             descent that would raise the benign loss is dropped.
Source       specs/attacks.md A.6, orthogonal sidestep; the projection is that of Yu et
             al. 2020, arXiv:2001.06782, on one side only.
Evidence     DESIGN: not in the paper whose sidestep it varies (see sidestepper).
Reduces to   SFT on the harmful pairs at part = 0, and where nothing conflicts.
Cost         2 forwards, 2 backwards, each on one role's batch.
"""

from flax import struct
import jax.numpy as jnp

from ftdefense.attacks import sidestepper
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    part: float = 1.0  # Of the conflicting component that is dropped.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": (), "benign": ()}


def project(grads, against, part=1.0):
    """`grads` less `part` of its component against `against`, if it has one."""
    square = tree.dot(against, against)
    scale = jnp.minimum(tree.dot(grads, against), 0) / jnp.where(square > 0, square, 1)
    return tree.add_scale(grads, -part * scale, against)


def direction(ctx, params, batches, rng):
    grad_harm, grad_cost, metrics = sidestepper.gradients(ctx, params, batches, rng)
    return project(grad_harm, grad_cost, ctx.hp.part), metrics


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: as sidestepper, projected",
    ),
}
