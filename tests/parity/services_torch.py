"""One direction of a service defense, ours as float64 numpy, and how it compares."""

import jax
import numpy as np
import torch

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift

from . import llama_torch as reference

ROWS = {"rows": 3, "length": 9, "vocab": 29}


def flat(grads):
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {tree.path_names(path): np.asarray(x, np.float64) for path, x in leaves}


def direction(module, model, params, batches, hp, *, start=None, memory=None, step=0):
    """{path: gradient} and what is remembered after; `start` is the frozen model."""
    start = params if start is None else start
    ctx = lift.context(model, types.Lineage(start, start), hp, step)

    def run(params, batches, memory):
        rng = jax.random.key(0)
        if memory is None:
            return *module.direction(ctx, params, batches, rng), None
        return module.direction(ctx, params, batches, rng, memory)

    grads, _, after = jax.jit(run)(params, batches, memory)
    return flat(grads), after


def moved(params, seed=5, scale=0.05):
    """Other weights near `params`."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(
        lambda x: x + scale * jax.random.normal(next(keys), x.shape), params
    )


def relative_error(mine, theirs):
    """Of the whole gradient, by norms."""
    assert set(mine) == set(theirs)
    theirs = {k: v.detach().numpy() for k, v in theirs.items()}
    error = sum(np.sum((mine[k] - theirs[k]) ** 2) for k in mine)
    return np.sqrt(error / sum(np.sum(v**2) for v in theirs.values()))


def combine(*terms):
    """Sum of coefficient times gradient."""
    return {k: sum(c * g[k] for c, g in terms) for k in terms[0][1]}


def log_probabilities(params, batch, config):
    """[B, L - 1, V]: of the next token at every position."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    return reference.logits(params, tokens, config)[:, :-1].log_softmax(-1)


def token_nats(params, batch, config):
    """(nats of the targets, weights), both [B, L - 1]."""
    said = log_probabilities(params, batch, config)
    wanted = torch.tensor(batch.tokens, dtype=torch.long)[:, 1:, None]
    weights = torch.tensor(batch.weights, dtype=torch.float64)[:, 1:]
    return -said.gather(-1, wanted)[..., 0], weights
