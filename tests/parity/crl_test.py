"""CRL's direction against PyTorch float64, same weights and batches."""

import jax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import crl
from ftdefense.methods import lift

from ..conftest import batch
from . import hidden_torch
from . import llama_torch

ROWS = {"rows": 3, "length": 9, "vocab": 29}


def test_crl(tiny_llama):
    """Catches a shifted mask, states before the norm, a frozen centroid, KL reversed."""
    model, start = tiny_llama
    params = tree.add_scale(start, 0.5, model.init(jax.random.key(7)))
    benign, harmful = batch(1, **ROWS), batch(2, **ROWS)
    benign.weights[0, 6:] = harmful.weights[1, 5:] = 0
    hp = crl.Hparams(
        layers=(1, 2), alpha=0.7, beta=0.6, margin_benign=0.4, margin_harmful=0.2
    )
    ctx = lift.context(model, types.Lineage(start), hp)
    data = {"benign": benign, "harmful": harmful}
    grads, _ = jax.jit(lambda p: crl.direction(ctx, p, data, jax.random.key(0)))(params)

    w, w_0 = (llama_torch.tensors(p) for p in (params, start))

    def run(weights, part):
        found = hidden_torch.forward(weights, part.tokens, model.config)
        return found.logits, torch.stack(found.states)[[1, 2]]

    def distance(x, y):
        return 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)

    m_b, m_h = (torch.tensor(d.weights, dtype=torch.float64) for d in (benign, harmful))
    logits, b = run(w, benign)
    logits_0, b_0 = (x.detach() for x in run(w_0, benign))
    _, h = run(w, harmful)
    h_0 = run(w_0, harmful)[1].detach()
    c = (h * m_h[None, ..., None]).sum((1, 2), keepdim=True) / m_h.sum()
    kept = torch.relu(distance(b_0, b) - distance(b, c) + 0.4) * m_b
    moved = torch.relu(distance(h, c) - distance(h, h_0) + 0.2) * m_h
    real = torch.ones(3, 9, dtype=torch.float64)
    real[:, 8:] = real[0, 6:] = 0
    p_0 = logits_0.log_softmax(-1)
    nats = (p_0.exp() * (p_0 - logits.log_softmax(-1))).sum(-1)
    total = 0.7 * kept.sum() / (2 * m_b.sum()) + 0.6 * moved.sum() / (2 * m_h.sum())
    total = total + 0.9 * (nats * real).sum() / real.sum()
    hidden_torch.assert_close(grads, llama_torch.gradient(total, w))
