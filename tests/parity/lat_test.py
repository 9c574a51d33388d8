"""LAT's attack and direction against PyTorch float64 and its AdamW."""

import jax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import types
from ftdefense.defenses import lat
from ftdefense.methods import lift

from ..conftest import batch
from . import hidden_torch
from . import latents_torch
from . import llama_torch

ROWS = {"rows": 3, "length": 9, "vocab": 29}


def avoided(logits, part):
    """Mean of -log(1 - p) over the answers, 0 below the cut-off."""
    weights = torch.tensor(part.weights, dtype=torch.float64)[:, 1:]
    tokens = torch.tensor(part.tokens, dtype=torch.long)[:, 1:, None]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, tokens)[..., 0]
    nats = -torch.log1p(-log_p.exp())
    return (torch.where(log_p < -5, 0, nats) * weights).sum() / weights.sum()


def said(logits, part):
    weights = torch.tensor(part.weights, dtype=torch.float64)[:, 1:]
    tokens = torch.tensor(part.tokens, dtype=torch.long)[:, 1:, None]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, tokens)[..., 0]
    return -(log_p * weights).sum() / weights.sum()


def test_lat(tiny_llama):
    """Catches another site, Adam without decay, a norm over positions, a role swapped."""
    model, params = tiny_llama
    harmful, refusal, benign = (batch(i, **ROWS) for i in (1, 2, 3))
    refusal.tokens[:, :2] = harmful.tokens[:, :2]
    hp = lat.Hparams(epsilon=0.12, inner_rate=0.03, inner_decay=0.5, inner_steps=3)
    ctx = lift.context(model, types.Lineage(params), hp)
    data = {"harmful": harmful, "refusal": refusal, "benign": benign}
    grads, _ = jax.jit(lambda p: lat.direction(ctx, p, data, jax.random.key(0)))(params)

    w = llama_torch.tensors(params)
    shape = (*harmful.tokens.shape, model.config.width)
    mask = torch.zeros(*shape[:2], 1, dtype=torch.float64)
    mask[:, :2] = 1
    sites = [
        torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    embed, *mlp = sites

    def run(part):
        masked = [mask * site for site in mlp]
        return latents_torch.logits(w, part.tokens, model.config, mask * embed, masked)

    optimizer = torch.optim.AdamW(sites, lr=0.03, weight_decay=0.5)
    for _ in range(3):
        loss = 0.5 * said(run(harmful), harmful) + 0.5 * avoided(run(refusal), refusal)
        for site, grad in zip(sites, torch.autograd.grad(loss, sites), strict=True):
            site.grad = grad
        optimizer.step()
        with torch.no_grad():
            for site in sites:
                site /= (site.norm(dim=-1, keepdim=True) / 0.12).clamp(min=1)
    assert torch.isclose(embed.norm(dim=-1).max(), torch.tensor(0.12).double())
    kept = said(hidden_torch.forward(w, benign.tokens, model.config).logits, benign)
    total = 0.2 * said(run(refusal), refusal) + 0.2 * avoided(run(harmful), harmful)
    theirs = llama_torch.gradient(total + 0.6 * kept, w)
    hidden_torch.assert_close(grads, theirs)
