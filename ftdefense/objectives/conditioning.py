"""How far the singular values of a feature Gram matrix are from being equal.

Source: Zheng et al. 2025, arXiv:2505.23760; code read at
amberyzheng/model-immunization-cond-num b749964 (specs: perturbation_and_meta 4.4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftdefense.core import draws

_JITTER = 1e-6  # Added to every eigenvalue, but not to the Frobenius norm.
_FLOOR = 1e-12  # Of the denominator of `ill`, which vanishes for equal singular values.


def gram(features_BxLxD: jax.Array, weights_BxL: jax.Array) -> jax.Array:
    """`sum_t w_t phi_t phi_t'` [D, D], in float32 or wider: a sum, not a mean."""
    wide = jnp.promote_types(features_BxLxD.dtype, jnp.float32)
    features_BxLxD = features_BxLxD.astype(wide)
    weights_BxL = weights_BxL.astype(wide)
    return jnp.einsum(
        "bld,ble,bl->de",
        features_BxLxD,
        features_BxLxD,
        weights_BxL,
        precision=jax.lax.Precision.HIGHEST,
    )


@jax.custom_batching.sequential_vmap
def _eigh(gram_DxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    # One matrix at a time: LAPACK's batched call never returned on a CPU (jaxlib 0.10.2)
    # inside a scan whose members train together.
    values_D, vectors_DxD = jnp.linalg.eigh(gram_DxD)
    return values_D, vectors_DxD


def largest(gram_DxD: jax.Array) -> jax.Array:
    """The largest eigenvalue of a symmetric matrix."""
    return _eigh(gram_DxD)[0][-1]


class Spectrum(NamedTuple):
    """What is asked of singular values: of one decomposition, which costs the most.

    Attributes:
      largest: s_1.
      smallest: the last that is positive.
      mean_square: ||S||_F^2 / D.
    """

    largest: jax.Array
    smallest: jax.Array
    mean_square: jax.Array


def spectrum(gram_DxD: jax.Array) -> Spectrum:
    """Of a symmetric matrix without negative eigenvalues.

    The gradients of its ends are v v' of their singular vectors: finite where values
    coincide, which those of all eigenvectors are not.
    """
    values_D, vectors_DxD = _eigh(jax.lax.stop_gradient(gram_DxD))
    positive = jnp.argmax(values_D > 0)

    def value(vector_D):
        return vector_D @ gram_DxD @ vector_D + _JITTER

    return Spectrum(
        value(vectors_DxD[:, -1]),
        value(jnp.take(vectors_DxD, positive, axis=1)),
        jnp.sum(jnp.square(gram_DxD)) / gram_DxD.shape[0],
    )


def well(s: Spectrum) -> jax.Array:
    """`s_max^2 / 2 - ||S||_F^2 / (2 D)`: zero iff all singular values are equal."""
    return jnp.square(s.largest) / 2 - s.mean_square / 2


def ill(s: Spectrum) -> jax.Array:
    """`1 / (||S||_F^2 / (2 D) - s_min^2 / 2)`: falls as singular values grow apart."""
    gap = s.mean_square / 2 - jnp.square(s.smallest) / 2
    return 1 / jnp.maximum(gap, _FLOOR)


def log_condition(s: Spectrum) -> jax.Array:
    """Logarithm of the condition number."""
    return jnp.log(s.largest) - jnp.log(jnp.maximum(s.smallest, _JITTER))


def subspace(width: int, count: int, seed: int | jax.Array = 0) -> jax.Array:
    """`count` random orthonormal directions [D, C]."""
    key = jax.random.key(seed)
    return jnp.linalg.qr(draws.normal(key, (width, count), jnp.float32))[0]
