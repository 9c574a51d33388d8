"""VAA's step against PyTorch float64: every group, with and without the ascent."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import vaa
from ftdefense.methods import optimizers

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services

STEPS = 50


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("ascends", [False, True])
def test_direction(tiny_llama, p, ascends):
    """Catches a descent, a norm per leaf, the other group, the sum of both gradients."""
    model, params = tiny_llama
    data = {
        "vulnerable": batch(1, **services.ROWS),
        "steady": batch(2, **services.ROWS),
    }
    hp = vaa.Hparams(
        optimizers.Optimizer(1e-4).tabulate(STEPS), rho=0.4, lam=1.0, eta=0.04
    )
    memory = {"p": jnp.float32(p)}
    step = STEPS if ascends else 0  # lam * t / T is 1 at the end and 0 at first.
    mine, _ = services.direction(vaa, model, params, data, hp, memory=memory, step=step)
    rows = data["vulnerable" if p else "steady"]
    w = reference.tensors(params)
    g = reference.gradient(reference.loss(w, rows, model.config), w)
    if ascends:
        uphill = reference.stepped(w, g, -0.4)
        g = reference.gradient(reference.loss(uphill, rows, model.config), uphill)
    assert services.relative_error(mine, g) <= 1e-5


@pytest.mark.parametrize("start", [0.12, 0.5, 0.88])
def test_probability_over_steps(tiny_llama, start):
    """p after the applied loss of whichever group was drawn, several steps on.

    Catches the clean loss, a rate without the group's probability, a missing clip.
    """
    model, params = tiny_llama
    data = {
        "vulnerable": batch(1, **services.ROWS),
        "steady": batch(2, **services.ROWS),
    }
    hp = vaa.Hparams(
        optimizers.Optimizer(1e-4).tabulate(STEPS), rho=0.4, lam=1.0, eta=0.04
    )
    w = reference.tensors(params)
    losses, gradients = {}, {}
    for role, rows in data.items():
        clean = reference.loss(w, rows, model.config)
        g = reference.gradient(clean, w)
        uphill = reference.stepped(w, g, -0.4)
        shifted = reference.loss(uphill, rows, model.config)
        losses[role] = shifted.item()
        gradients[role] = reference.gradient(shifted, uphill)
    memory = {"p": jnp.float32(start)}
    mine, after = services.direction(
        vaa, model, params, data, hp, memory=memory, step=STEPS
    )
    # Which group was drawn shows in the gradient.
    errors = {r: services.relative_error(mine, g) for r, g in gradients.items()}
    drawn = min(errors, key=errors.get)
    assert errors[drawn] <= 1e-5
    a, c = start, 1 - start
    if drawn == "vulnerable":
        a = a * np.exp(0.04 * losses[drawn] / start)
    else:
        c = c * np.exp(0.04 * losses[drawn] / (1 - start))
    expected = np.clip(a / (a + c), 0.1, 0.9)
    np.testing.assert_allclose(after["p"], expected, rtol=1e-5)
