"""Rotary positions, with the scalings that Llama checkpoints use."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched beyond the pretraining context.

    `kind` is `linear` (all frequencies divided by `factor`) or `llama3` (only those
    whose wavelength exceeds the original context, with a smooth transition).
    Source: the Llama 3.1 release, as documented in transformers' rope utilities.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequencies in radians per token, float32 [head_dim / 2]."""
    base = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return base / scaling.factor
    wavelength = 2 * math.pi / base
    context = scaling.original_max_length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    return blended.astype(np.float32)


def rotate(x_BxLxHxK: jax.Array, angles_BxLxF: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + K/2) of each head by the angle of its position."""
    cos = jnp.cos(angles_BxLxF)[:, :, None, :]
    sin = jnp.sin(angles_BxLxF)[:, :, None, :]
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x_BxLxHxK.dtype)
