"""The cosine of two losses' gradients, and its own gradient in two more passes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import tree
from ftdefense.core import types

Loss = Callable[[types.Params], jax.Array]


class Coupling(NamedTuple):
    """Of losses a and b, in this order where there are two of a thing."""

    cosine: jax.Array
    grad: types.Params  # Of the cosine.
    losses: tuple[jax.Array, jax.Array]
    grads: tuple[types.Params, types.Params]


def of_gradients(
    loss_a: Loss,
    loss_b: Loss,
    params: types.Params,
    epsilon: float | jax.Array = 1e-3,
    exact: bool = False,
) -> Coupling:
    """With unit gradients a, b and c = cos(g_a, g_b), over all leaves together,

        grad c = H_a (b - c a) / ||g_a|| + H_b (a - c b) / ||g_b||.

    Norms, c and directions are constants here, and that is no approximation: (b - c a)
    / ||g_a|| is the derivative of c in g_a. H v is (g(params + epsilon v) - g(params)) /
    epsilon, or with `exact` forward over reverse. A vanishing gradient couples nothing.
    """
    a, g_a = jax.value_and_grad(loss_a)(params)
    b, g_b = jax.value_and_grad(loss_b)(params)
    norm_a, norm_b = tree.norm(g_a), tree.norm(g_b)
    per_a, per_b = _inverse(norm_a), _inverse(norm_b)
    unit_a, unit_b = optax.tree.scale(per_a, g_a), optax.tree.scale(per_b, g_b)
    cosine = tree.dot(g_a, g_b) / (norm_a * norm_b + 1e-8)

    def product(loss, grad, vector):
        if exact:
            return jax.jvp(jax.grad(loss), (params,), (vector,))[1]
        ahead = jax.grad(loss)(tree.add_scale(params, epsilon, vector))
        return optax.tree.scale(1 / epsilon, optax.tree.sub(ahead, grad))

    turned_a = product(loss_a, g_a, tree.add_scale(unit_b, -cosine, unit_a))
    turned_b = product(loss_b, g_b, tree.add_scale(unit_a, -cosine, unit_b))
    turned = tree.add_scale(optax.tree.scale(per_a, turned_a), per_b, turned_b)
    return Coupling(cosine, turned, (a, b), (g_a, g_b))


def _inverse(norm: jax.Array) -> jax.Array:
    """1 / norm, and 0 at 0: without an epsilon, so that scales of losses cancel."""
    return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
