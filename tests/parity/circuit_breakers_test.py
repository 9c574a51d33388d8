"""Circuit breakers against PyTorch float64, same weights and batches."""

import functools

import jax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import circuit_breakers
from ftdefense.methods import lift
from ftdefense.models import transformer

from ..conftest import batch
from . import hidden_torch
from . import llama_torch

ROWS = {"rows": 3, "length": 9, "vocab": 29}


@functools.cache
def deep_llama():
    """Four layers: targets 1 and 2 of 0 .. 4, so that the last block is dropped."""
    config = transformer.ModelConfig(
        vocab_size=29,
        width=16,
        layers=4,
        heads=4,
        kv_heads=2,
        mlp_width=24,
        max_length=32,
    )
    model = transformer.LanguageModel(config)
    start = model.init(jax.random.key(0))
    return model, start, tree.add_scale(start, 0.5, model.init(jax.random.key(1)))


@pytest.mark.parametrize(("drop", "blocks"), [(True, 3), (False, 4)])
def test_circuit_breakers(drop, blocks):
    """Catches other states at the cut, masks, a squared norm, the schedule."""
    model, start, params = deep_llama()
    harmful, retain = batch(1, **ROWS), batch(2, **ROWS)
    retain.weights[0, 6:] = harmful.weights[1, 5:] = 0
    hp = circuit_breakers.Hparams(alpha=3.0, drop=drop)
    ctx = lift.context(model, types.Lineage(start), hp, 6)._replace(steps=20)
    data = {"harmful": harmful, "retain": retain}
    grads, _ = jax.jit(
        lambda p: circuit_breakers.direction(ctx, p, data, jax.random.key(0))
    )(params)

    w, w_0 = (llama_torch.tensors(p) for p in (params, start))

    def states(weights, part):
        found = hidden_torch.forward(weights, part.tokens, model.config, blocks)
        return torch.stack(found.states)

    mask = torch.ones(3, 9, dtype=torch.float64)
    mask[:, 8:] = 0
    mask_harmful, mask_retain = mask.clone(), mask.clone()
    mask_harmful[1, 5:] = mask_retain[0, 6:] = 0
    h, o = states(w, harmful)[[1, 2]], states(w_0, harmful)[[1, 2]].detach()
    cos = torch.nn.functional.cosine_similarity(h, o, dim=-1)
    turned = (torch.relu(cos) * mask_harmful).sum() / (2 * mask_harmful.sum())
    h, o = (states(x, retain) for x in (w, w_0))
    moved = (torch.linalg.vector_norm(h - o.detach(), dim=-1) * mask_retain).mean()
    total = 3 * (7 / 40 * moved + 33 / 40 * turned)
    hidden_torch.assert_close(grads, llama_torch.gradient(total, w))
