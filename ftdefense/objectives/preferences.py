"""Losses on sequence log-probabilities: DPO, IPO, KTO, NPO.

Conventions of TRL (Hugging Face), one number an example; s is a policy's sequence
log-probability minus the reference's. Sums over tokens unless a function says otherwise.
"""

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import losses


def check_pairs(chosen: types.Batch, rejected: types.Batch) -> None:
    """Every row has a partner.

    Raises:
      UserError: naming both shapes.
    """
    if chosen.tokens.shape != rejected.tokens.shape:
        raise errors.UserError(
            f"rows of shape {chosen.tokens.shape} are paired with "
            f"{rejected.tokens.shape}; paired rows go one to one."
        )


def sequence_logps(
    outputs: types.Outputs, batch: types.Batch
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted token log-probabilities, sum of weights) of each row, [B]."""
    nats_BxL = losses.cross_entropy(outputs.logits[:, :-1], batch.tokens[:, 1:])
    weights_BxL = batch.weights[:, 1:].astype(nats_BxL.dtype)
    return -jnp.sum(nats_BxL * weights_BxL, -1), jnp.sum(weights_BxL, -1)


def dpo(s_chosen: jax.Array, s_rejected: jax.Array, beta: float) -> jax.Array:
    """`-log sigmoid(beta (s+ - s-))`, [B]; ln 2 at the reference.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    return -jax.nn.log_sigmoid(beta * (s_chosen - s_rejected))


def ipo(s_chosen: jax.Array, s_rejected: jax.Array, beta: float) -> jax.Array:
    """`(s+ - s- - 1 / (2 beta)) ** 2`, [B], of length-averaged log-ratios.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17, length-averaged as in TRL.
    """
    return jnp.square(s_chosen - s_rejected - 1 / (2 * beta))


def kto(
    s: jax.Array,
    desirable: jax.Array,
    z0: jax.Array,
    beta: float,
    lam_desirable: float = 1.0,
    lam_undesirable: float = 1.0,
) -> jax.Array:
    """`lam (1 - sigmoid(+-beta (s - z0)))`, [B]: + where desirable, - elsewhere.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8.

    Args:
      z0: reference point, as of `kto_reference`; no gradient passes through it.
    """
    z0 = jax.lax.stop_gradient(z0)
    gain = jax.nn.sigmoid(beta * (s - z0))
    loss = jax.nn.sigmoid(beta * (z0 - s))
    return jnp.where(
        desirable, lam_desirable * (1 - gain), lam_undesirable * (1 - loss)
    )


def kto_reference(s_mismatched: jax.Array) -> jax.Array:
    """The mean of s over mismatched pairs (prompt i, answer i + 1), at least 0."""
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(s_mismatched), 0.0))


def npo(s: jax.Array, beta: float) -> jax.Array:
    """`-(2 / beta) log sigmoid(-beta s)`: unlearning; its slope in s is 1 at s = 0.

    Source: Zhang et al. 2024, arXiv:2404.05868, Eq. 3.
    """
    return -(2 / beta) * jax.nn.log_sigmoid(-beta * s)
