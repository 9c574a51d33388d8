"""Losses whose attacks are known in closed form: specs/attacks.md A.7, B.7."""

import jax.numpy as jnp


def self_destruct_harmful(w):
    """A-u3: harm is at x = 1 ..."""
    return (w["x"] - 1.0) ** 2


def self_destruct_benign(w):
    """... where it costs capability, unless y follows."""
    return 4.0 * (w["x"] - w["y"]) ** 2


def trap(w):
    """A-u4: a narrow basin at 0 in a wide one at 3."""
    return 0.5 * (w["x"] - 3.0) ** 2 - jnp.exp(-50.0 * w["x"] ** 2)


def scaled(w):
    """B.7: theta = 1e-3 phi, so that steps of phi hardly move it."""
    return (1e-3 * w["phi"] - 1.0) ** 2


def scalars(**values):
    return {name: jnp.asarray(value, jnp.float64) for name, value in values.items()}
