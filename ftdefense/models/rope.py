"""Rotary positions: frequencies, their scalings, and the rotation of heads.

Source: Su et al. 2021, arXiv:2104.09864; the pairing of dimensions (i with i + Dh/2)
and the Llama-3 scaling are those of the published Llama checkpoints.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How wavelengths are stretched beyond the context of pretraining.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" divides low ones,
        keeps high ones and blends between.
      factor: the divisor.
      low_freq_factor: llama3; wavelengths above original / low are divided.
      high_freq_factor: llama3; wavelengths below original / high are kept.
      original_max_length: llama3; tokens of context before the extension.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token of each pair of dimensions, float32 [head_dim / 2]."""
    base = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        scaled = base
    elif scaling.kind == "linear":
        scaled = base / scaling.factor
    elif scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_length * base / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        scaled = base * (kept + (1 - kept) / scaling.factor)
    else:
        raise ValueError(f"rope scaling {scaling.kind!r} is neither linear nor llama3.")
    return scaled.astype(np.float32)


def turns(
    positions_BxL: jax.Array, frequencies_C: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, L, 1, head_dim / 2], at each position."""
    positions_BxLx1x1 = positions_BxL.astype(jnp.float32)[:, :, None, None]
    angles_BxLx1xC = positions_BxLx1x1 * frequencies_C.reshape(1, 1, 1, -1)
    return jnp.cos(angles_BxLx1xC), jnp.sin(angles_BxLx1xC)


def rotate(x_BxLxHxC: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns dimension i of each head against i + C/2; float32 inside."""
    cos, sin = turn
    first, second = jnp.split(x_BxLxHxC.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BxLxHxC.dtype)
