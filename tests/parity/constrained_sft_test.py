"""Constrained SFT against the gradient of its objective in PyTorch float64."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import constrained_sft

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


def test_constrained_sft(tiny_llama):
    """Catches a beta at the wrong token, the sign of D, and a reference that moves."""
    model, start = tiny_llama
    params = services.moved(start)
    data = batch(1, rows=3, length=12, vocab=29)
    hp = constrained_sft.Hparams(floor=0.0)
    mine, _ = services.direction(
        constrained_sft, model, params, {"user": data}, hp, start=start
    )
    w = reference.tensors(params)
    first, _ = services.token_nats(reference.tensors(start), data, model.config)
    nats, asked = services.token_nats(w, data, model.config)
    log_ratio = first.detach() - nats
    beta = torch.tensor([1.0, 0.5, 2, 2, 2, 2, 0.1, 0.1, 0.1, 0.1, 1.0])
    beta = beta.double()[None]  # The first and the last places have no weight.
    value = -(2 / beta) * torch.nn.functional.logsigmoid(beta * log_ratio)
    theirs = reference.gradient((value * asked).sum() / asked.sum(), w)
    assert services.relative_error(mine, theirs) <= 1e-5
