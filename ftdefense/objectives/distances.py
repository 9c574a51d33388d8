"""Distances between hidden states, in float32 or wider, without NaN gradients at 0."""

import jax
import jax.numpy as jnp

from ftdefense.core import draws
from ftdefense.core import tree
from ftdefense.core import types


def attended(batch: types.Batch) -> jax.Array:
    """1 on prompt, answer and end tokens, 0 on padding; float32 [B, L].

    Padding begins after the last weighted token; a row without weights is all padding.
    """
    weights_BxL = jnp.asarray(batch.weights, jnp.float32)
    ahead_BxL = jax.lax.cummax(weights_BxL, axis=1, reverse=True)
    return (ahead_BxL > 0).astype(jnp.float32)


def norm(x: jax.Array) -> jax.Array:
    """L2 norm over the last axis; its gradient at 0 is 0."""
    square = jnp.sum(jnp.square(tree.wide(x)), -1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine of the angle over the last axis; 0, with gradient 0, at a zero vector."""
    return jnp.sum(_unit(x) * _unit(y), -1)


def _unit(x: jax.Array) -> jax.Array:
    length = norm(x)[..., None]
    return jnp.where(length > 0, tree.wide(x), 0) / jnp.where(length > 0, length, 1)


def _square_distances(rows_BxF: jax.Array) -> jax.Array:
    # By products: the differences of all pairs, [2B, 2B, F], cost fifty times a step.
    # Full precision, centred rows and an exact diagonal keep it as good as they are.
    rows_BxF = rows_BxF - jax.lax.stop_gradient(jnp.mean(rows_BxF, 0, keepdims=True))
    gram_BxB = jnp.matmul(rows_BxF, rows_BxF.T, precision=jax.lax.Precision.HIGHEST)
    lengths_B = jnp.sum(jnp.square(rows_BxF), -1)
    square_BxB = lengths_B[:, None] + lengths_B[None] - 2 * gram_BxB
    off = 1 - jnp.eye(rows_BxF.shape[0], dtype=rows_BxF.dtype)
    return jnp.maximum(square_BxB, 0) * off


def mmd(
    x_BxF: jax.Array, y_BxF: jax.Array, multiplier: float = 2.0, kernels: int = 5
) -> jax.Array:
    """Maximum mean discrepancy of two samples of B rows, biased, not below 0.

    A sum of `kernels` Gaussian kernels exp(-d^2 / (w * multiplier ** i)), i = 0, 1, ...,
    w the mean squared distance of distinct rows over multiplier ** (kernels // 2); no
    gradient passes through w.
    """
    rows_BxF = tree.wide(jnp.concatenate([x_BxF, y_BxF]))
    square_BxB = _square_distances(rows_BxF)
    count = rows_BxF.shape[0]
    width = jax.lax.stop_gradient(jnp.sum(square_BxB)) / (count * (count - 1))
    width = jnp.where(width > 0, width, 1) / multiplier ** (kernels // 2)
    kernel_BxB = sum(
        jnp.exp(-square_BxB / (width * multiplier**i)) for i in range(kernels)
    )
    half = count // 2
    xx, yy = kernel_BxB[:half, :half], kernel_BxB[half:, half:]
    xy, yx = kernel_BxB[:half, half:], kernel_BxB[half:, :half]
    return jnp.mean(xx + yy - xy - yx)


@jax.custom_vjp
def to_noise(
    states_NxBxLxD: jax.Array, mask_BxL: jax.Array, rng: types.Rng
) -> jax.Array:
    """Mean over layers of the MMD of masked states from masked Gaussian noise.

    A row of a sample is one text, all of its L * D numbers; the noise is standard
    normal whatever the scale of the layer, and fresh for every layer. Differentiated
    once, in reverse and by the states alone.
    """
    return _value_and_gradient(states_NxBxLxD, mask_BxL, rng)[0]


def _value_and_gradient(states_NxBxLxD, mask_BxL, rng):
    # The gradient on the way forward: noise is drawn once, and of a layer no more is kept
    # than the cotangent that the states would get on the way back.
    layers = states_NxBxLxD.shape[0]
    mask_BxLx1 = mask_BxL[..., None]

    def distance(states_BxLxD, rng):
        x_BxLxD = tree.wide(states_BxLxD)
        z_BxLxD = draws.normal(rng, x_BxLxD.shape, x_BxLxD.dtype)
        x_BxF, z_BxF = (
            (rows * mask_BxLx1).reshape(rows.shape[0], -1).astype(rows.dtype)
            for rows in (x_BxLxD, z_BxLxD)
        )
        return mmd(x_BxF, z_BxF) / layers

    def add(total, layer):
        value, gradient = jax.value_and_grad(distance)(*layer)
        return total + value, gradient

    zero = jnp.zeros((), jnp.promote_types(states_NxBxLxD.dtype, jnp.float32))
    rngs = jax.random.split(rng, layers)
    return jax.lax.scan(add, zero, (states_NxBxLxD, rngs))


def _scaled(gradient_NxBxLxD, cotangent):
    scaled = (cotangent * gradient_NxBxLxD).astype(gradient_NxBxLxD.dtype)
    return scaled, None, None  # The mask and the key get none.


to_noise.defvjp(_value_and_gradient, _scaled)
