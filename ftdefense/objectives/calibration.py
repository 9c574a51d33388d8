"""Cross-entropy after the best linear reading of the logits, entries in [-1, 1].

A model that is confidently wrong has a high loss and hides nothing: who negates its
logits has the answers. What calibration leaves is what cannot be read off so easily.

Source: Henderson et al. 2022, arXiv:2211.14946, second-hand (specs:
perturbation_and_meta 3.2); solvers and `scale` are RECONSTRUCTION.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import conditioning
from ftdefense.objectives import losses

KINDS = ("scale", "map", "none")
MAP_LIMIT = (
    4096  # Vocabulary above which a map of V x V numbers is out of the question.
)
_HALVINGS = 40


def loss(
    logits_BxLxV: jax.Array, batch: types.Batch, kind: str, map_steps: int = 2000
) -> jax.Array:
    """Nats per weighted token, calibrated on the same tokens.

    No gradient passes through the calibration: at its optimum none would arrive
    (envelope theorem).

    Args:
      logits_BxLxV: entry i predicts token i + 1.
      batch: targets and weights.
      kind: `scale` (one number for all tokens), `map` (V x V numbers): the loss is at
        most ln V; or `none`.
      map_steps: of the solver; the more, the nearer the map is to its optimum.
    """
    if kind not in KINDS:
        raise errors.unknown("calibration", kind, KINDS)
    vocab = logits_BxLxV.shape[-1]
    logits_TxV = logits_BxLxV[:, :-1].reshape(-1, vocab)
    targets_T = batch.tokens[:, 1:].reshape(-1)
    weights_T = batch.weights[:, 1:].reshape(-1).astype(logits_TxV.dtype)
    weights_T /= jnp.maximum(jnp.sum(weights_T), jnp.finfo(weights_T.dtype).tiny)
    fixed_TxV = jax.lax.stop_gradient(logits_TxV)

    def nats(logits_TxV: jax.Array) -> jax.Array:
        return jnp.sum(weights_T * losses.cross_entropy(logits_TxV, targets_T))

    if kind == "none":
        return nats(logits_TxV)
    scale = best_scale(lambda scale: nats(scale * fixed_TxV), logits_TxV.dtype)
    if kind == "scale":
        return nats(scale * logits_TxV)
    if vocab > MAP_LIMIT:
        raise errors.UserError(
            f"calibration=map needs {vocab} x {vocab} numbers; set calibration=scale."
        )
    gram_VxV = fixed_TxV.T @ (weights_T[:, None] * fixed_TxV)
    map_VxV = best_map(
        lambda map_VxV: nats(fixed_TxV @ map_VxV),
        scale * jnp.eye(vocab, dtype=logits_TxV.dtype),
        # The Hessian of a log-sum-exp is at most a half.
        0.5 * conditioning.largest(gram_VxV),
        map_steps,
    )
    return nats(logits_TxV @ map_VxV)


def best_scale(nats: Callable[[jax.Array], jax.Array], dtype) -> jax.Array:
    """The number in [-1, 1] at which the convex `nats` is least, by bisection."""
    slope = jax.grad(nats)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    ends = jnp.asarray(-1.0, dtype), jnp.asarray(1.0, dtype)
    # The upper end: 1 exactly where nothing is to be calibrated.
    return jax.lax.fori_loop(0, _HALVINGS, halve, ends)[1]


def best_map(
    nats: Callable[[jax.Array], jax.Array],
    start_VxV: jax.Array,
    curvature: jax.Array,
    steps: int,
) -> jax.Array:
    """Accelerated projected descent on the convex `nats` of a map in [-1, 1]^(V x V).

    `curvature` is no less than that of `nats` in any direction.
    """
    slope = jax.grad(nats)
    rate = 1 / jnp.maximum(curvature, jnp.finfo(curvature.dtype).tiny)

    def descend(i, maps):
        map_VxV, ahead_VxV = maps
        new_VxV = jnp.clip(ahead_VxV - rate * slope(ahead_VxV), -1, 1)
        return new_VxV, new_VxV + i / (i + 3) * (new_VxV - map_VxV)

    return jax.lax.fori_loop(0, steps, descend, (start_VxV, start_VxV))[0]
