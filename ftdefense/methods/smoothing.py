"""Smoothed versions of a loss, as (value, gradient); each with its exact gradient."""

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import draws
from ftdefense.core import tree
from ftdefense.core import types

KINDS = ("none", "sam", "rs", "gp", "cr", "wa")


def value_and_grad(loss, params: types.Params, hp, rng: types.Rng):
    """Loss at `params`, and the gradient of its smoothed version.

    `hp` has `smooth`, one of `KINDS`, and the coefficients rho, sigma, mu, draws and
    shipped; see `defenses.unlearn_smooth`. Shifts are taken in float32: in bfloat16 a
    shift of small global norm would be lost in most weights.
    """
    params = tree.wide(params)
    if hp.smooth == "rs":
        return _randomised(loss, params, hp, rng)
    value, grad = jax.value_and_grad(loss)(params)
    if hp.smooth == "sam":
        shifted = tree.add_scale(params, hp.rho, tree.normalize(grad))
        return value, jax.grad(loss)(shifted)
    if hp.smooth == "gp" and not hp.shipped:
        bent = product(loss, params, tree.normalize(grad))
        return value, tree.add_scale(grad, hp.rho, bent)
    if hp.smooth == "cr":
        if hp.shipped:
            return value, optax.tree.scale(2, grad)
        shifted = tree.add_scale(params, hp.mu, tree.normalize(grad))
        change = optax.tree.sub(jax.grad(loss)(shifted), grad)
        unit = tree.normalize(change)
        bent = optax.tree.sub(product(loss, shifted, unit), product(loss, params, unit))
        return value, tree.add_scale(grad, hp.rho, bent)
    return value, grad


def product(loss, params: types.Params, vector: types.Params) -> types.Params:
    """Hessian of `loss` times `vector`, forward over reverse: exact."""
    vector = jax.lax.stop_gradient(optax.tree.cast_like(vector, params))
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def _randomised(loss, params, hp, rng):
    """Mean over draws of the loss at weights with Gaussian noise."""

    def add(total, key):
        noise = optax.tree.random_like(key, params, draws.normal, jnp.float32)
        noisy = tree.add_scale(params, hp.sigma, noise)
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(noisy)), None

    shapes = jax.eval_shape(jax.value_and_grad(loss), params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, jax.random.split(rng, hp.draws))
    return jax.tree.map(lambda x: x / hp.draws, total)
