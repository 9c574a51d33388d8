"""Shifts of hidden states, and gradients with respect to them."""

import jax
import jax.numpy as jnp

from ftdefense.core import types


def shift_at(site: str) -> types.Intervention:
    """Adds this layer's tap to the hidden state at `site`."""

    def intervene(hidden_BxLxD, where, layer, tap):
        del layer
        if where != site:
            return hidden_BxLxD
        return hidden_BxLxD + tap.astype(hidden_BxLxD.dtype)

    return intervene


def gradient(ctx, params, batch, rng, site: str) -> tuple[jax.Array, jax.Array]:
    """Loss, and its gradient [N, B, L, D] with respect to a zero shift at `site`."""
    hidden = jax.eval_shape(ctx.model, params, batch.tokens).hidden[site]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    zeros_NxBxLxD = jnp.zeros(hidden.shape, wide)

    def loss(shift_NxBxLxD):
        return ctx.loss(
            params, batch, rng, intervene=shift_at(site), taps=shift_NxBxLxD
        )

    return jax.value_and_grad(loss)(zeros_NxBxLxD)


def value_and_grad(ctx, params, batch, rng, site: str, shift_NxBxLxD: jax.Array):
    """Loss under a constant shift, and its gradient with respect to `params`."""
    return jax.value_and_grad(ctx.loss)(
        params,
        batch,
        rng,
        intervene=shift_at(site),
        taps=jax.lax.stop_gradient(shift_NxBxLxD),
    )
