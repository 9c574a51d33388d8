"""KT-IPA's parts in PyTorch float64: KTO with mismatched pairs, attack steps, purge."""

import jax
import numpy as np
import torch

from ftdefense.core import types

from . import hidden_torch
from . import llama_torch as llama


def roles(make_batch, names, **shape):
    """One batch a role; prompts of 2 and of 3 tokens, so that answers shift."""
    found = {name: make_batch(i, **shape) for i, name in enumerate(names, 1)}
    for b in found.values():
        b.weights[1::2, 2] = 0
    return found


def stacked(*batches):
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def joined(*batches):
    return types.Batch(
        *(np.concatenate(x) for x in zip(*map(_pair, batches), strict=True))
    )


def _pair(b):
    return b.tokens, b.weights


def mismatched(rows):
    """Prompt i with answer i + 1, built with lists."""
    length = rows.tokens.shape[1]
    tokens, weights = np.zeros_like(rows.tokens), np.zeros_like(rows.weights)
    starts = [int(np.flatnonzero(w)[0]) for w in rows.weights]
    for i, start in enumerate(starts):
        j = (i + 1) % len(starts)
        answer = [*rows.tokens[i, :start], *rows.tokens[j, starts[j] :]][:length]
        weight = [*np.zeros(start), *rows.weights[j, starts[j] :]][:length]
        tokens[i, : len(answer)], weights[i, : len(weight)] = answer, weight
    return types.Batch(tokens, weights)


def logps(w, rows, config):
    """Sum over the answer, [M]."""
    tokens = torch.tensor(rows.tokens, dtype=torch.long)
    said = llama.logits(w, tokens, config)[:, :-1].log_softmax(-1)
    chosen = said.gather(-1, tokens[:, 1:, None])[..., 0]
    return (chosen * torch.tensor(rows.weights, dtype=torch.float64)[:, 1:]).sum(-1)


def kto(w, reference, refusal, benign, harmful, config, beta, lam):
    rows = joined(refusal, benign, harmful)
    others = mismatched(rows)
    with torch.no_grad():
        apart = logps(w, others, config) - logps(reference, others, config)
        z0 = apart.mean().clamp(min=0)
        start = logps(reference, rows, config)
    s = logps(w, rows, config) - start
    split = len(rows.tokens) - len(harmful.tokens)
    wanted = lam[0] * (1 - torch.sigmoid(beta * (s[:split] - z0)))
    unwanted = lam[1] * (1 - torch.sigmoid(beta * (z0 - s[split:])))
    return torch.cat([wanted, unwanted]).mean()


def attacked(w, batches, config, alpha):
    for rows in batches:
        g = llama.gradient(llama.loss(w, rows, config), w)
        w = llama.stepped(w, g, alpha)
    return w


def mapping(w, rows, table, config):
    """1 - |cos| over all hidden states and positions."""
    total = 0
    attended = hidden_torch.real(rows)
    states = hidden_torch.forward(w, rows.tokens, config, attended=attended).states
    for h in states:
        cosine = torch.nn.functional.cosine_similarity(h, table, dim=-1)
        total = total + (1 - cosine.abs()).mean()
    return total / len(states)
