"""T-Vaccine's scores and direction against PyTorch float64, same weights and batches."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import t_vaccine

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


def shift_gradient(w, data, config):
    """The gradient [N, B, L, D] at a zero shift of every attention output."""
    shape = (config.layers, *data.tokens.shape, config.width)
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(reference.loss(w, data, config, zero), zero)[0]


@pytest.mark.parametrize("drawn", [[True, False], [False, True], [True, True]])
def test_between_draws(tiny_llama, drawn):
    """Catches a norm over all layers or per layer, and a shift elsewhere."""
    model, params = tiny_llama
    data = {
        "alignment": batch(1, **services.ROWS),
        "harmful": batch(2, **services.ROWS),
    }
    memory = {
        "probability": jnp.array([0.3, 0.7], jnp.float32),
        "drawn": jnp.array(drawn),
    }
    hp = t_vaccine.Hparams(rho=3.0, layers=1)
    mine, after = services.direction(
        t_vaccine, model, params, data, hp, memory=memory, step=7
    )
    w = reference.tensors(params)
    g = shift_gradient(w, data["alignment"], model.config)
    g = g * torch.tensor(drawn)[:, None, None, None]
    shift = 3.0 * g / (g.norm() + 1e-7)
    value = reference.loss(w, data["alignment"], model.config, shift.detach())
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
    np.testing.assert_array_equal(after["drawn"], memory["drawn"])
    np.testing.assert_array_equal(after["probability"], memory["probability"])


@pytest.mark.parametrize("rows", [1, 3])
def test_scores(tiny_llama, rows):
    """At step 0: shares of the layers' norms, of the first rows of the harmful batch.

    Catches squared norms, other rows, scores of the alignment batch.
    """
    model, params = tiny_llama
    data = {
        "alignment": batch(1, **services.ROWS),
        "harmful": batch(2, **services.ROWS),
    }
    memory = {
        "probability": jnp.array([0.5, 0.5], jnp.float32),
        "drawn": jnp.array([False, False]),
    }
    hp = t_vaccine.Hparams(rho=3.0, layers=1, scored_rows=rows)
    mine, after = services.direction(
        t_vaccine, model, params, data, hp, memory=memory, step=0
    )
    w = reference.tensors(params)
    first = data["harmful"].replace(
        tokens=data["harmful"].tokens[:rows], weights=data["harmful"].weights[:rows]
    )
    norms = shift_gradient(w, first, model.config).flatten(1).norm(dim=1).numpy()
    np.testing.assert_allclose(after["probability"], norms / norms.sum(), rtol=1e-5)
    # One of the two was drawn, and the direction is already that of its shift.
    drawn = np.asarray(after["drawn"])
    assert drawn.sum() == 1
    g = shift_gradient(w, data["alignment"], model.config)
    g = g * torch.tensor(drawn)[:, None, None, None]
    shift = 3.0 * g / (g.norm() + 1e-7)
    value = reference.loss(w, data["alignment"], model.config, shift.detach())
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
