"""The gradient of SideStepper (A-u6), and its self-destruct toy to the end (A-u3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import kick_settle
from ftdefense.attacks import sidestepper
from ftdefense.core import types
from ftdefense.methods import lift

from ..conftest import batch
from . import attacks_test as shared


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_gradient_is_that_of_the_sum(lam):
    """A-u6. Catches a weight on the wrong role, and a mean over both halves."""
    params = shared.MODEL.init(jax.random.key(0))
    hp = sidestepper.Hparams(lam=lam)
    ctx = lift.context(shared.MODEL, types.Lineage(params), hp)
    rows = {"harmful": batch(1), "benign": batch(2)}
    direction = jax.jit(lambda *x: sidestepper.direction(ctx, *x)[0])
    found = direction(params, rows, jax.random.key(0))
    gradient = jax.jit(jax.grad(ctx.loss))
    harmful, benign = (gradient(params, rows[role]) for role in rows)
    rest = jax.tree.map(lambda g, h, b: g - h - lam * b, found, harmful, benign)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(rest)) < 1e-6 * max(
        1, lam
    )


def test_self_destruct_toy_to_the_end():
    """A-u3 after 400 steps. Catches a joint objective that stops half-way."""
    with jax.enable_x64(True):

        def harm(p):
            return (p[0] - 1) ** 2

        def cost(p):
            return 4 * (p[0] - p[1]) ** 2

        rates = jnp.full((400,), 0.05)
        naive = shared.descend(jax.grad(harm), jnp.zeros(2), rates)
        joint = shared.descend(
            jax.grad(lambda p: harm(p) + cost(p)), jnp.zeros(2), rates
        )
        assert harm(naive) < 1e-25
        np.testing.assert_allclose(cost(naive), 4.0, rtol=1e-9)
        assert harm(joint) < 1e-15
        assert cost(joint) < 1e-15


def test_trap_toy_at_every_rate():
    """A-u4. Catches a kick that is shorter than its share of the steps."""
    with jax.enable_x64(True):

        def loss(x):
            return 0.5 * (x - 3) ** 2 - jnp.exp(-50 * x**2)

        gradient, start = jax.grad(loss), jnp.float64(1e-3)
        trap = 0.0311657
        np.testing.assert_allclose(loss(trap), 3.454393, atol=1e-6)
        curvature = jax.grad(gradient)(jnp.float64(trap))
        np.testing.assert_allclose(curvature, 87.007, atol=1e-3)
        run = jax.jit(lambda rates: shared.descend(gradient, start, rates))
        for rate, end in ((0.01, trap), (0.022, trap), (0.05, 3), (0.1, 3), (0.5, 3)):
            np.testing.assert_allclose(run(jnp.full((2000,), rate)), end, atol=1e-4)
        for kick in (1, 2, 3, 5, 10, 50, 75, 100):
            table = kick_settle.schedule(float(kick), 0.05).table(2000)[:2000]
            end = trap if kick < 5 else 3
            np.testing.assert_allclose(run(0.01 * table), end, atol=1e-4)
