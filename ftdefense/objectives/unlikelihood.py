"""Unlikelihood: -log(1 - p) of tokens that should not be said.

Source: Welleck et al. 2019, arXiv:1908.04319; the cut-off is HarmBench's.
"""

import jax
import jax.numpy as jnp

THRESHOLD = -5.0  # Nats: what is as unlikely as this already is left alone.


def unlikelihood(logits_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    """-log(1 - p(target)) in nats [B, L]; 0, and no gradient, where log p < -5."""
    logps_BxLxV = jax.nn.log_softmax(logits_BxLxV)
    ids_1x1xV = jnp.arange(logits_BxLxV.shape[-1])[None, None]
    asked_BxLxV = targets_BxL[..., None] == ids_1x1xV
    target_BxL = jnp.sum(jnp.where(asked_BxLxV, logps_BxLxV, 0), -1)
    others_BxLxV = jnp.where(asked_BxLxV, -jnp.inf, logps_BxLxV)
    nats_BxL = -jax.nn.logsumexp(others_BxLxV, axis=-1)
    return jnp.where(target_BxL < THRESHOLD, 0, nats_BxL)
