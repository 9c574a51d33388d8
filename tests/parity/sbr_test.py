"""Safety Anchor against PyTorch float64."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import sbr

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


def test_sbr(tiny_llama):
    """Catches a state before the last norm, at another token, or a sum for a mean."""
    model, start = tiny_llama
    params = services.moved(start)
    user, harmful = batch(1, **services.ROWS), batch(2, **services.ROWS)
    data = {"user": user, "harmful": harmful}
    hp = sbr.Hparams(lam=20.0)
    mine, _ = services.direction(sbr, model, params, data, hp, start=start)

    def states(w):
        # With the identity for a head, the logits are what the head reads.
        head = torch.eye(model.config.width, dtype=torch.float64)
        headless = {**w, "lm_head": {"kernel": head}}
        tokens = torch.tensor(harmful.tokens, dtype=torch.long)
        # The first two tokens are the prompt.
        return reference.logits(headless, tokens, model.config)[:, 1]

    w = reference.tensors(params)
    first = states(reference.tensors(start)).detach()
    value = reference.loss(w, user, model.config)
    value = value + 20.0 * ((states(w) - first) ** 2).mean()
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
