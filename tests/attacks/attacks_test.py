"""The attacks of the seed paper: identities and the two toys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import kick_settle
from ftdefense.attacks import sft
from ftdefense.attacks import sidestepper
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()


def attacked(name, hp, batches, steps=4):
    method = registry.method("attacks", name, MODEL)
    lineage = types.Lineage(MODEL.init(jax.random.key(0)))
    state = loop.init(method, lineage, hp, jax.random.key(1), steps)
    state, metrics = loop.run_chunk(
        method.step, False, state, lineage, batches, jax.random.key(2), jnp.int32(0)
    )
    return state.params, metrics


def stacked(seed, steps=4):
    return jax.tree.map(
        lambda *x: np.stack(x), *(batch(seed + i) for i in range(steps))
    )


@pytest.mark.parametrize(
    "adapter", [adapters.Full(), adapters.LoRA(alpha=4.0, dropout=0.5, rank=2)]
)
def test_sidestepper_without_benign_weight_is_sft(adapter):
    """A-u5, to the bit. Catches a benign term that lam does not scale, and dropout

    by another key than SFT's.
    """
    optimizer = optimizers.Optimizer(1e-2)
    harmful, benign = stacked(0), stacked(50)
    plain, _ = attacked("sft", sft.Hparams(optimizer, adapter), {"user": harmful})
    side, _ = attacked(
        "sidestepper",
        sidestepper.Hparams(optimizer, adapter, lam=0.0),
        {"harmful": harmful, "benign": benign},
    )
    jax.tree.map(np.testing.assert_array_equal, plain, side)


def test_pooled_halves_of_equal_length_are_half_the_sum():
    """Catches weights that are not carried into the pooled mean."""
    model_loss = jax.jit(
        lambda p, b, pooled: sidestepper.direction(
            _context(sidestepper.Hparams(pooled=pooled)), p, b, jax.random.key(0)
        )[0],
        static_argnums=2,
    )
    params = MODEL.init(jax.random.key(0))
    both = {"harmful": batch(1), "benign": batch(2)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=2e-4, atol=1e-6),
        model_loss(params, both, True),
        model_loss(params, both, False),
    )


def _context(hp):
    from ftdefense.methods import lift

    return lift.context(MODEL, types.Lineage(MODEL.init(jax.random.key(0))), hp)


def test_every_attack_lowers_its_own_loss():
    """Catches an attack without an optimisation loop, and an ascent."""
    optimizer = optimizers.Optimizer(3e-2)
    same = jax.tree.map(lambda x: np.stack([x] * 12), batch(0))
    for name, hp, roles in (
        ("sft", sft.Hparams(optimizer), ("user",)),
        ("kick_settle", kick_settle.Hparams(optimizer), ("user",)),
        ("sidestepper", sidestepper.Hparams(optimizer), ("harmful", "benign")),
    ):
        _, metrics = attacked(name, hp, dict.fromkeys(roles, same), 12)
        key = "loss/harmful" if name == "sidestepper" else "loss/user"
        assert metrics[key][-1] < 0.8 * metrics[key][0], name


def test_published_presets_take_the_published_steps():
    """B.2 and A.2. Catches epochs counted over the wrong rows."""
    steps = sft.PRESETS["booster"].total_steps(1000, 5, 0)
    assert steps == 4000
    assert sidestepper.PRESETS["paper"].total_steps(10_000, 4, 0) == 7500
    assert sft.PRESETS["sdd"].total_steps(100, 10, 0) == 50


def descend(gradient, start, rates):
    """Plain gradient descent: the paper's argument needs no optimizer state."""

    def body(x, rate):
        return x - rate * gradient(x), None

    return jax.lax.scan(body, start, rates)[0]


def test_self_destruct_toy():
    """A-u3. Catches a joint objective that does not keep the benign loss."""
    with jax.enable_x64(True):

        def harm(p):
            return (p[0] - 1) ** 2

        def cost(p):
            return 4 * (p[0] - p[1]) ** 2

        rates = jnp.full((20,), 0.05)
        naive = descend(jax.grad(harm), jnp.zeros(2), rates)
        joint = descend(jax.grad(lambda p: harm(p) + cost(p)), jnp.zeros(2), rates)
        np.testing.assert_allclose(naive, [0.878423, 0.0], atol=1e-6)
        np.testing.assert_allclose(joint, [0.642488, 0.595017], atol=1e-6)
        np.testing.assert_allclose(cost(naive), 3.086510, atol=1e-6)
        np.testing.assert_allclose(cost(joint), 0.009014, atol=1e-6)


def test_trap_toy():
    """A-u4 and A-u8: a kick leaves the basin, and so does a swept constant rate."""
    with jax.enable_x64(True):

        def loss(x):
            return 0.5 * (x - 3) ** 2 - jnp.exp(-50 * x**2)

        gradient, start = jax.grad(loss), jnp.float64(1e-3)
        for rate, end in ((0.01, 0.0311657), (0.05, 3.0)):
            reached = descend(gradient, start, jnp.full((2000,), rate))
            np.testing.assert_allclose(reached, end, atol=1e-4)
        for kick, end in ((2.0, 0.0311657), (10.0, 3.0), (75.0, 3.0)):
            table = kick_settle.schedule(kick, 0.05).table(2000)[:2000]
            reached = descend(gradient, start, 0.01 * table)
            np.testing.assert_allclose(reached, end, atol=1e-4)
