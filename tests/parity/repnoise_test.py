"""RepNoise's direction against PyTorch float64, same weights, batches and noise."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import types
from ftdefense.defenses import repnoise
from ftdefense.methods import lift

from ..conftest import batch
from . import hidden_torch
from . import llama_torch

ROWS = {"rows": 3, "length": 9, "vocab": 29}


def mmd(u, z):
    rows = torch.cat([u, z])
    square = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    n = len(rows)
    width = square.detach().sum() / (n * n - n) / 4
    kernel = sum(torch.exp(-square / (width * 2**i)) for i in range(5))
    b = len(u)
    return (kernel[:b, :b] + kernel[b:, b:] - kernel[:b, b:] - kernel[b:, :b]).mean()


def test_repnoise(tiny_llama):
    """Catches a proper shift of the mask, a lens without the second norm, a divisor;
    padding that attends to padding.
    """
    model, params = tiny_llama
    config = model.config
    harmful = hidden_torch.ragged(batch(1, **ROWS))
    refusal = hidden_torch.ragged(batch(2, **ROWS))
    refusal.tokens[:, :2] = harmful.tokens[:, :2]
    harmful.tokens[0, 4], refusal.tokens[1, 5] = 0, 0
    hp = repnoise.Hparams(alpha=0.7, beta=0.9)
    rng = jax.random.key(5)
    ctx = lift.context(model, types.Lineage(params), hp)
    data = {"harmful": harmful, "refusal": refusal}
    grads, _ = jax.jit(lambda p: repnoise.direction(ctx, p, data, rng))(params)

    w = llama_torch.tensors(params)
    mask = hidden_torch.divergence(harmful, refusal)
    outputs, kept = (
        hidden_torch.forward(w, x.tokens, config, attended=hidden_torch.real(x))
        for x in (harmful, refusal)
    )
    rngs = jax.random.split(jax.random.split(rng, 4)[3], config.layers)
    noise = 0
    for mlp, key in zip(outputs.mlp, rngs, strict=True):
        z = torch.tensor(np.asarray(jax.random.normal(key, mlp.shape), np.float64))
        u, z = ((x * mask[..., None]).flatten(1) for x in (mlp, z))
        noise = noise + mmd(u, z) / config.layers
    ascent = hidden_torch.ascent(w, outputs, harmful.tokens, mask, config)
    stability = hidden_torch.masked_ce(kept.logits, refusal.tokens, mask)
    total = stability + 0.9 * noise - 0.7 * torch.log(ascent)
    hidden_torch.assert_close(grads, llama_torch.gradient(total, w))
