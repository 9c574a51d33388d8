"""Unlikelihood: closed form, cut-off, gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.objectives import unlikelihood


def value(logits, target):
    targets = jnp.full((1, 1), target)
    return unlikelihood.unlikelihood(logits[None, None], targets)[0, 0]


value_and_grad = jax.jit(jax.value_and_grad(value))


def test_closed_form():
    """-log(1 - p), slope p (1 - p) / (1 - p). Catches log p, or the sign."""
    logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    found, grad = value_and_grad(logits, 1)
    np.testing.assert_allclose(found, np.log(2), rtol=1e-5)
    np.testing.assert_allclose(grad, [-0.2, 0.5, -0.3], rtol=1e-5)


def test_unlikely_tokens_are_left_alone():
    """Catches a threshold of the other sign, or one on 1 - p."""
    for target, cut in ((-4.9, False), (-5.1, True)):
        logits = jnp.array([jnp.log1p(-jnp.exp(target)), target])
        found, grad = value_and_grad(logits, 1)
        assert (found == 0) == cut
        assert np.any(grad != 0) != cut


def test_a_certain_token_is_finite():
    """Catches log(1 - exp(log p)): minus infinity once p rounds to 1."""
    found, grad = jax.value_and_grad(value)(jnp.array([-40.0, 0.0]), 1)
    np.testing.assert_allclose(found, 40.0, rtol=1e-6)
    np.testing.assert_allclose(grad, [-1.0, 1.0], rtol=1e-6)
