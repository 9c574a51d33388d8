"""Attacks on hidden states: where shifts go, the ball, and AdamW."""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.methods import latents
from ftdefense.models import toy

from ..conftest import batch


def test_hooks_shift_what_they_should():
    """Catches another block, another site, or a shift beyond the mask."""
    model, tokens = toy.Toy(), batch(1).tokens
    params = model.init(jax.random.key(0))
    shifts = {"embed": jnp.full((4, 6, 8), 2.0), "mlp": jnp.full((1, 4, 6, 8), 3.0)}
    mask = jnp.zeros((4, 6)).at[:, 0].set(1)
    plain = model(params, tokens).hidden
    hidden = model(params, tokens, **latents.hooks(shifts, mask, (1,), 2)).hidden
    np.testing.assert_allclose(
        hidden["embed"] - plain["embed"],
        2 * mask[..., None] * jnp.ones((1, 1, 8)),
        atol=1e-6,
    )
    del shifts["embed"]
    hidden = model(params, tokens, **latents.hooks(shifts, mask, (1,), 2)).hidden
    np.testing.assert_array_equal(hidden["embed"], plain["embed"])
    np.testing.assert_array_equal(hidden["mlp"][0], plain["mlp"][0])
    moved = hidden["resid"][1] - plain["resid"][1]
    np.testing.assert_allclose(
        moved, 3 * mask[..., None] * jnp.ones((1, 1, 8)), atol=1e-5
    )


def test_project():
    """Catches one norm for all positions or sites, and 0 / 0."""
    shifts = {"a": jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])}
    found = latents.project(shifts, 1.0)["a"]
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(latents.project(shifts, 0.0)["a"], 0.0)


def test_descend_is_adamw_then_a_cut():
    """Two steps on a line, by hand. Catches Adam without decay, or a cut at the end."""
    settings = {"steps": 2, "rate": 0.5, "decay": 0.1, "radius": 0.4}
    start = {"a": jnp.zeros((1, 1))}

    def loss(shifts, rng):
        del rng
        return -2 * jnp.sum(shifts["a"])

    found = latents.descend(loss, start, jax.random.key(0), **settings)["a"]
    np.testing.assert_allclose(found, 0.4, rtol=1e-5)  # 0.5, cut; 0.88, cut.
    settings["radius"] = 10.0
    found = latents.descend(loss, start, jax.random.key(0), **settings)["a"]
    np.testing.assert_allclose(found, 0.5 * (1 - 0.05) + 0.5, rtol=1e-5)
