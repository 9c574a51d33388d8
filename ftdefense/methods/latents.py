"""Attacks on hidden states: additive shifts, found by projected gradient descent.

Shifts are a dict with `embed` [B, L, D], for the embeddings, and `mlp` [S, B, L, D], for
the MLP outputs of S blocks; either may be missing. As the residual stream adds what an
MLP returns, the latter also shift the stream after their blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import types
from ftdefense.objectives import distances

Shifts = dict[str, jax.Array]


def hooks(
    shifts: Shifts, mask_BxL: jax.Array, layers: tuple[int, ...], blocks: int
) -> dict[str, Any]:
    """`intervene` and `taps` that add the shifts where the mask is not 0."""
    mask_BxLx1 = mask_BxL[..., None]
    mlp_SxBxLxD = shifts["mlp"] * mask_BxLx1[None].astype(shifts["mlp"].dtype)
    taps = jnp.zeros((blocks, *mlp_SxBxLxD.shape[1:]), mlp_SxBxLxD.dtype)
    taps = taps.at[jnp.asarray(layers)].set(mlp_SxBxLxD)

    def intervene(hidden_BxLxD, site, layer, tap):
        del layer
        if site == "embed" and "embed" in shifts:
            tap = shifts["embed"] * mask_BxLx1.astype(shifts["embed"].dtype)
        elif site != "mlp":
            return hidden_BxLxD
        return hidden_BxLxD + tap.astype(hidden_BxLxD.dtype)

    return {"intervene": intervene, "taps": taps}


def project(shifts: Shifts, radius: float | jax.Array) -> Shifts:
    """Into the L2 ball, site by site and position by position; 0 at radius 0."""

    def shrink(x: jax.Array) -> jax.Array:
        norm = distances.norm(x)[..., None]
        least = jnp.finfo(norm.dtype).tiny
        return x * jnp.minimum(1, radius / jnp.maximum(norm, least))

    return jax.tree.map(shrink, shifts)


def descend(
    loss: Callable[[Shifts, types.Rng], jax.Array],
    shifts: Shifts,
    rng: types.Rng,
    *,
    steps: int,
    rate: float | jax.Array,
    decay: float | jax.Array,
    radius: float | jax.Array,
) -> Shifts:
    """AdamW on the shifts, projected after each step; no gradient passes out."""
    optimizer = optax.adamw(rate, weight_decay=decay)

    def body(carry, rng):
        shifts, state = carry
        grads = jax.grad(loss)(shifts, rng)
        updates, state = optimizer.update(grads, state, shifts)
        shifts = project(optax.apply_updates(shifts, updates), radius)
        return (shifts, state), None

    start = shifts, optimizer.init(shifts)
    (shifts, _), _ = jax.lax.scan(body, start, jax.random.split(rng, steps))
    return jax.lax.stop_gradient(shifts)
