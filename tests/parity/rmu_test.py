"""RMU's direction against PyTorch float64, same weights, batches and vector."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import rmu

from ..conftest import batch
from . import hidden_torch
from . import llama_torch
from . import services_torch


@pytest.mark.parametrize("layer", [0, 7])
def test_rmu(tiny_llama, layer):
    """Catches another site or block, a masked mean, and gradients outside the three;
    padding that attends to padding, of the reference too.
    """
    model, params = tiny_llama
    config = model.config
    block = min(layer, config.layers - 1)
    data = {
        role: hidden_torch.ragged(batch(i, **services_torch.ROWS))
        for i, role in enumerate(("harmful", "benign"))
    }
    hp = rmu.Hparams(c=5.0, alpha=30.0, layer=layer)
    away = services_torch.moved(params)
    unit = jax.random.uniform(jax.random.key(2), (config.width,))
    unit = unit / np.linalg.norm(unit)
    mine, kept = services_torch.direction(
        rmu, model, away, data, hp, start=params, memory=unit
    )
    np.testing.assert_array_equal(kept, unit)

    def states(w, role):
        tokens, attended = data[role].tokens, hidden_torch.real(data[role])
        return hidden_torch.forward(w, tokens, config, attended=attended).resid[block]

    w = llama_torch.tensors(away)
    first = states(llama_torch.tensors(params), "benign").detach()
    vector = torch.tensor(5.0 * np.asarray(unit, np.float64))
    value = ((states(w, "harmful") - vector) ** 2).mean()
    value = value + 30.0 * ((states(w, "benign") - first) ** 2).mean()
    theirs = llama_torch.gradient(value, w)
    down = ("layers", "mlp", "down", "kernel")
    theirs = {k: g if k == down else torch.zeros_like(g) for k, g in theirs.items()}
    assert services_torch.relative_error(mine, theirs) <= 1e-5
