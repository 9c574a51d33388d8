"""Panacea against PyTorch float64, with the harmful loss below and above the cap."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import panacea

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


@pytest.mark.parametrize("cap", [50.0, 0.1])
def test_panacea(tiny_llama, cap):
    """Catches a norm per leaf, a step downhill, a cap on the loss at w."""
    model, params = tiny_llama
    user, harmful = batch(1, **services.ROWS), batch(2, **services.ROWS)
    hp = panacea.Hparams(lam=0.6, rho=0.5, cap=cap)
    mine, eps = services.direction(
        panacea,
        model,
        params,
        {"user": user, "harmful": harmful},
        hp,
        memory=panacea.memory(None, params, None),
    )
    w = reference.tensors(params)
    g = reference.gradient(reference.loss(w, user, model.config), w)
    h = reference.gradient(reference.loss(w, harmful, model.config), w)
    moved = reference.stepped(w, h, -0.5)
    value = reference.loss(moved, harmful, model.config).clamp(max=cap)
    after = reference.gradient(value, moved)
    theirs = services.combine((1, g), (-0.6, after), (0.6, h))
    assert services.relative_error(mine, theirs) <= 1e-5
    norm = torch.sqrt(sum((x * x).sum() for x in h.values()))
    perturbation = {k: 0.5 * x / (norm + 1e-7) for k, x in h.items()}
    assert services.relative_error(services.flat(eps), perturbation) <= 1e-5
