"""SEAM's direction against PyTorch float64, same weights and batches."""

import jax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import types
from ftdefense.defenses import seam
from ftdefense.methods import lift

from ..conftest import batch
from . import hidden_torch
from . import llama_torch

ROWS = {"rows": 3, "length": 9, "vocab": 29}
ALPHA, BETA, EPSILON = 0.7, 2.0, 0.4


def dot(x, y):
    return sum((x[k] * y[k]).sum() for k in x)


def moved(params, step, path=()):
    """New leaves at params + step."""
    if isinstance(params, dict):
        return {k: moved(v, step, (*path, k)) for k, v in params.items()}
    return (params + step[path]).detach().requires_grad_(True)


def graph_gradient(value, params):
    """A gradient that can be differentiated again."""
    paths, leaves = zip(*llama_torch.leaves(params), strict=True)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    return dict(zip(paths, grads, strict=True))


@pytest.mark.parametrize("exact", [False, True])
def test_seam(tiny_llama, exact):
    """Catches a direction, a norm or a point of the difference; the Hessian's part too;
    padding that attends to padding.
    """
    model, params = tiny_llama
    config = model.config
    harmful, refusal, benign = (
        hidden_torch.ragged(batch(i, **ROWS)) for i in (1, 2, 3)
    )
    refusal.tokens[:, :2] = harmful.tokens[:, :2]
    harmful.tokens[0, 4], refusal.tokens[1, 5] = 0, 0
    hp = seam.Hparams(alpha=ALPHA, beta=BETA, epsilon=EPSILON, exact=exact)
    ctx = lift.context(model, types.Lineage(params), hp)
    data = {"harmful": harmful, "refusal": refusal, "benign": benign}
    grads, metrics = jax.jit(lambda p: seam.direction(ctx, p, data, jax.random.key(0)))(
        params
    )

    w = llama_torch.tensors(params)
    mask = hidden_torch.divergence(harmful, refusal)
    whole = benign.replace(weights=hidden_torch.real(benign).numpy())

    def masked(w, rows):
        attended = hidden_torch.real(rows)
        outputs = hidden_torch.forward(w, rows.tokens, config, attended=attended)
        return outputs, hidden_torch.masked_ce(outputs.logits, rows.tokens, mask)

    outputs, _ = masked(w, harmful)
    ascent = hidden_torch.ascent(w, outputs, harmful.tokens, mask, config)
    total = ALPHA * masked(w, refusal)[1] - torch.log(ascent)

    losses = (
        lambda w: masked(w, harmful)[1],
        lambda w: llama_torch.loss(w, whole, config),
    )
    g_a, g_b = (graph_gradient(loss(w), w) for loss in losses)
    n_a, n_b = dot(g_a, g_a).sqrt(), dot(g_b, g_b).sqrt()
    cosine = dot(g_a, g_b) / (n_a * n_b)
    assert abs(float(metrics["cosine/harmful_benign"]) - cosine.item()) < 1e-5
    if exact:
        theirs = llama_torch.gradient(total + BETA * cosine, w)
        hidden_torch.assert_close(grads, theirs)
        return
    theirs = llama_torch.gradient(total, w)
    a, b = ({k: v / n for k, v in g.items()} for g, n in ((g_a, n_a), (g_b, n_b)))
    for loss, grad, along, across, norm in (
        (losses[0], g_a, a, b, n_a),
        (losses[1], g_b, b, a, n_b),
    ):
        step = {k: EPSILON * (across[k] - cosine * along[k]) for k in along}
        ahead = moved(w, step)
        there = llama_torch.gradient(loss(ahead), ahead)
        for k in theirs:
            theirs[k] = theirs[k] + BETA / EPSILON * (there[k] - grad[k]) / norm
    hidden_torch.assert_close(grads, theirs)
