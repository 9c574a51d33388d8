"""Schedules and optimizer against closed forms and PyTorch's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftdefense.attacks import kick_settle
from ftdefense.attacks import sidestepper
from ftdefense.methods import optimizers
from ftdefense.methods import schedules


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_kick_settle_golden():
    """A-u1 of specs/attacks.md. Catches floor for ceil, and a cosine from step 0."""
    table = 1e-5 * kick_settle.schedule(kick=75.0, kick_ratio=0.1).table(1000)
    golden = {
        0: 7.5e-4,
        99: 7.5e-4,
        100: 1e-5,
        325: 8.550179e-6,
        550: 5.05e-6,
        775: 1.549821e-6,
        1000: 1e-7,
    }
    for step, value in golden.items():
        np.testing.assert_allclose(table[step], value, rtol=1e-6)
    share = table[:100].sum() / table[:1000].sum()
    np.testing.assert_allclose(share, 0.942804, atol=1e-6)


def test_sidestepper_golden():
    """A-u2. Catches a warm-up that starts at one step's worth."""
    optimizer = sidestepper.PRESETS["paper"].hp.optimizer
    table = optimizer.learning_rate * optimizer.schedule.table(7500)
    golden = {0: 0.0, 375: 1e-5, 750: 2e-5, 4125: 1e-5, 7500: 0.0}
    for step, value in golden.items():
        np.testing.assert_allclose(table[step], value, rtol=1e-6, atol=1e-18)


def test_no_kick_is_a_plain_cosine():
    """A-u5. Catches a kick of one step at ratio 0."""
    plain = schedules.Schedule(floor=0.01, decay="cosine").table(64)
    kick = kick_settle.schedule(kick=1.0, kick_ratio=0.0).table(64)
    np.testing.assert_array_equal(plain, kick)


def test_constant_ignores_its_floor():
    """Catches a constant schedule that sits at floor + (1 - floor)."""
    np.testing.assert_array_equal(schedules.Schedule(floor=0.3).table(5), np.ones(6))


def test_clip_is_pytorchs():
    """min(1, c / (norm + 1e-6)). Catches the missing epsilon and a NaN at infinity."""
    grads = {"a": jnp.array([3.0, 4.0])}
    clipped, _ = optimizers.clip(1.0).update(grads, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], np.array([3, 4]) / (5 + 1e-6))
    same, _ = optimizers.clip(jnp.inf).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(same["a"], grads["a"])


def test_adamw_equals_pytorch():
    """Catches decay on norm scales, coupled decay, and a schedule one step late."""
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)), "scale": rng.normal(size=(2, 3))}
    optimizer = optimizers.Optimizer(
        0.1, schedules.Schedule(0.5, decay="cosine"), weight_decay=0.1
    ).tabulate(6)
    transform = optimizer.transform()
    params = jax.tree.map(jnp.asarray, start)
    state = transform.init(params)
    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": 0.1},
            {"params": [theirs["scale"]], "weight_decay": 0.0},
        ],
        lr=0.1,
        eps=1e-8,
    )
    for t in range(6):
        grads = {k: rng.normal(size=v.shape) for k, v in start.items()}
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(0.1 * optimizer.schedule[t])
        for name, value in theirs.items():
            value.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        torch_optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(params[name], value.detach().numpy(), rtol=1e-8)
