"""Leaves that are frozen for a while, layer by layer, as PyTorch skips them.

A parameter without a gradient is passed over by PyTorch's AdamW: no decay of its
moments, no weight decay, no count. A zero gradient would still move it.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import tree
from ftdefense.core import types

SCOPES = ("attention", "layers")


class AdamByLeaf(NamedTuple):
    """Moments, and steps taken of each leaf, [N, 1, ...] under a layer axis."""

    count: Any
    mu: Any
    nu: Any


def by_layer(params: types.Params, active_N: jax.Array, scope: str) -> Any:
    """A mask for each leaf: `active_N` under `scope`, a name on its path, else True.

    `layers` covers whole layers, `attention` what is inside their attention modules.
    """

    def mask(path, leaf):
        names = tree.path_names(path)
        if "layers" not in names or scope not in names:
            return jnp.ones((1,) * leaf.ndim, bool)
        return active_N.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(mask, params)


def scale_by_adam(b1, b2, eps) -> optax.GradientTransformationExtraArgs:
    """Adam with a step count per leaf and layer; what `active` excludes keeps its state.

    `active` is a tree of masks that broadcast to the leaves; without it all are active.
    """

    def init(params):
        def zeros(p):
            return jnp.zeros_like(p)

        def counts(path, leaf):
            stacked = "layers" in tree.path_names(path)
            ones = (1,) * (leaf.ndim - 1)
            return jnp.zeros(
                (leaf.shape[0], *ones) if stacked else (1, *ones)[: leaf.ndim]
            )

        count = jax.tree_util.tree_map_with_path(counts, params)
        return AdamByLeaf(
            count, jax.tree.map(zeros, params), jax.tree.map(zeros, params)
        )

    def update(updates, state, params=None, *, active=None, **extra):
        del params, extra
        if active is None:
            active = jax.tree.map(lambda g: jnp.ones((1,) * g.ndim, bool), updates)

        def leaf(g, count, mu, nu, on):
            later = count + 1
            mu_now = b1 * mu + (1 - b1) * g
            nu_now = b2 * nu + (1 - b2) * jnp.square(g)
            step = mu_now / (1 - b1**later)
            step = step / (jnp.sqrt(nu_now / (1 - b2**later)) + eps)
            kept = (later, mu_now.astype(mu.dtype), nu_now.astype(nu.dtype))
            olds = (count, mu, nu)
            return (
                jnp.where(on, step, 0).astype(g.dtype),
                *(jnp.where(on, new, old) for new, old in zip(kept, olds, strict=True)),
            )

        found = jax.tree.map(leaf, updates, state.count, state.mu, state.nu, active)
        steps, *parts = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0,) * 4), found
        )
        return steps, AdamByLeaf(*parts)

    return optax.GradientTransformationExtraArgs(init, update)


def freeze() -> optax.GradientTransformationExtraArgs:
    """Zeroes the updates of what `active` excludes."""

    def update(updates, state, params=None, *, active=None, **extra):
        del params, extra
        if active is None:
            return updates, state
        return jax.tree.map(lambda u, on: jnp.where(on, u, 0), updates, active), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
