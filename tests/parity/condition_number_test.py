"""R_well and R_ill of a Llama's features against PyTorch float64."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import condition_number

from ..conftest import batch
from . import hidden_torch
from . import llama_torch as reference
from . import services_torch as services


def gram(w, rows, config):
    phi = hidden_torch.forward(w, rows.tokens, config).states[-1][:, :-1]
    phi = phi[torch.tensor(rows.weights[:, 1:] > 0)]
    return phi.T @ phi


def extremes(s):
    values = torch.linalg.eigvalsh(s + 1e-6 * torch.eye(len(s), dtype=s.dtype))
    return values.max(), values[values > 1e-6].min()


def test_condition_number(tiny_llama):
    """Catches jitter in the Frobenius norm, a mean over tokens, features before the norm."""
    model, params = tiny_llama
    shape = {**services.ROWS, "rows": 8}
    data = {"retain": batch(1, **shape), "harmful": batch(2, **shape)}
    hp = condition_number.Hparams(lam_retain=1e-5, lam_harmful=3e4)
    mine, _ = services.direction(condition_number, model, params, data, hp)
    w = reference.tensors(params)
    kept, hurt = (gram(w, data[role], model.config) for role in ("retain", "harmful"))
    width = model.config.width
    well = extremes(kept)[0] ** 2 / 2 - (kept**2).sum() / (2 * width)
    ill = 1 / ((hurt**2).sum() / (2 * width) - extremes(hurt)[1] ** 2 / 2)
    f = reference.loss(w, data["retain"], model.config)
    value = f + 1e-5 * well + 3e4 * ill
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
