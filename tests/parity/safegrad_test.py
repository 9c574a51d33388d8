"""SafeGrad against PyTorch float64, where the gradients conflict and where not."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import safegrad

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_safegrad(tiny_llama, kl):
    """Catches a divergence the wrong way round, on prompts, or of the trained model."""
    model, start = tiny_llama
    params = services.moved(start)
    user, alignment = batch(1, **services.ROWS), batch(2, **services.ROWS)
    hp = safegrad.Hparams(lam=0.4, kl=kl)
    data = {"user": user, "alignment": alignment}
    mine, _ = services.direction(safegrad, model, params, data, hp, start=start)
    w = reference.tensors(params)
    g_u = reference.gradient(reference.loss(w, user, model.config), w)
    q = services.log_probabilities(w, alignment, model.config)
    frozen = reference.tensors(start)
    p = services.log_probabilities(frozen, alignment, model.config).detach()
    p, q = (p, q) if kl == "forward" else (q, p)
    _, weights = services.token_nats(w, alignment, model.config)
    value = ((p.exp() * (p - q)).sum(-1) * weights).sum() / weights.sum()
    g_a = reference.gradient(value, w)
    dot, square = (sum((a * g_a[k]).sum() for k, a in g.items()) for g in (g_u, g_a))
    theirs = services.combine((1, g_u), (0.4 - min(float(dot), 0) / float(square), g_a))
    assert services.relative_error(mine, theirs) <= 1e-5
