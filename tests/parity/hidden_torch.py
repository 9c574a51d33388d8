"""Hidden states and lens of the PyTorch Llama, for methods that read inside the model.

Written beside `llama_torch`, whose norm and rotation it shares.
"""

from typing import NamedTuple

import numpy as np
import torch

from . import llama_torch as llama


class Outputs(NamedTuple):
    """`states` are Hugging Face's N + 1; `mlp`, `resid` have one entry a block."""

    logits: torch.Tensor
    states: list
    mlp: list
    resid: list


def forward(params, tokens, config, blocks=None, attended=None):
    """All hidden states of the first `blocks` blocks, read out as if there were no more.

    Nothing attends to keys where `attended` [B, L] is 0; such positions still have states.
    """
    blocks = config.layers if blocks is None else blocks
    x = params["embed"]["embedding"][torch.tensor(np.asarray(tokens), dtype=torch.long)]
    states, mlp, resid = [x], [], []
    stack, epsilon = params["layers"], config.norm_epsilon
    batch, length = tokens.shape
    hidden = (torch.ones(length, length).tril() == 0)[None]
    if attended is not None:
        hidden = hidden | (attended[:, None] == 0)
    # Finite, so that a row of padding alone is not NaN.
    least = torch.finfo(torch.float64).min
    groups = config.heads // config.kv_heads
    for layer in range(blocks):
        attention = {n: stack["attention"][n]["kernel"][layer] for n in "qkvo"}
        y = llama._norm(x, stack["attention_norm"]["scale"][layer], epsilon)
        q, k, v = (
            (y @ attention[n]).unflatten(-1, (-1, config.head_dim)) for n in "qkv"
        )
        q, k = (llama._rotate(h, config.rope_theta) for h in (q, k))
        k, v = (h.repeat_interleave(groups, 2) for h in (k, v))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / config.head_dim**0.5
        weights = scores.masked_fill(hidden[:, None], least).softmax(-1)
        mixed = torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(batch, length, -1)
        x = x + mixed @ attention["o"]
        y = llama._norm(x, stack["mlp_norm"]["scale"][layer], epsilon)
        gate, up = (y @ stack["mlp"][n]["kernel"][layer] for n in ("gate", "up"))
        mlp.append(
            (gate * torch.sigmoid(gate) * up) @ stack["mlp"]["down"]["kernel"][layer]
        )
        x = x + mlp[-1]
        resid.append(x)
        states.append(x)
    final = llama._norm(x, params["final_norm"]["scale"], epsilon)
    states[-1] = final
    return Outputs(final @ params["lm_head"]["kernel"], states, mlp, resid)


def real(rows):
    """[B, L]: 1 up to the last token with a weight, 0 on the padding behind it."""
    found = torch.zeros(rows.weights.shape)
    for row, weights in zip(found, rows.weights, strict=True):
        row[: 1 + max(i for i, weight in enumerate(weights) if weight > 0)] = 1
    return found


def ragged(rows):
    """The same tokens; row i ends in 2 i more positions of padding, none of them alike."""
    weights = rows.weights.copy()
    for i, row in enumerate(weights):
        row[len(row) - 1 - 2 * i :] = 0
    return rows.replace(weights=weights)


def readout(params, hidden, config):
    """Last norm, then head."""
    normed = llama._norm(hidden, params["final_norm"]["scale"], config.norm_epsilon)
    return normed @ params["lm_head"]["kernel"]


def masked_ce(logits, tokens, mask):
    """The published masked cross-entropy: zeroed logits, id 0 never a target."""
    targets = torch.tensor(np.asarray(tokens), dtype=torch.long)[:, 1:]
    said = (logits[:, :-1] * mask[:, :-1, None]).log_softmax(-1)
    nats = -said.gather(-1, targets[..., None])[..., 0]
    counted = mask[:, 1:] * (targets != 0)
    return (nats * counted).sum() / counted.sum()


def divergence(left, right):
    return torch.tensor(np.asarray(left.tokens != right.tokens), dtype=torch.float64)


def ascent(params, outputs, tokens, mask, config):
    """1 + (CE_final + sum of the lens) / (N + 1)."""
    total = masked_ce(outputs.logits, tokens, mask)
    for state in outputs.states:
        total = total + masked_ce(readout(params, state, config), tokens, mask)
    return 1 + total / len(outputs.states)


def frozen(params):
    """The same values, without gradients."""
    if isinstance(params, dict):
        return {name: frozen(value) for name, value in params.items()}
    return params.detach()


def assert_close(grads, theirs, tolerance=1e-5):
    """JAX gradients against {path: tensor}, relative to the norm of the whole gradient."""
    import jax

    from ftdefense.core import tree

    flat = jax.tree_util.tree_leaves_with_path(grads)
    mine = {tree.path_names(path): np.asarray(leaf, np.float64) for path, leaf in flat}
    assert set(mine) == set(theirs)
    theirs = {k: v.detach().numpy() for k, v in theirs.items()}
    error = sum(np.sum((mine[k] - theirs[k]) ** 2) for k in mine)
    scale = sum(np.sum(theirs[k] ** 2) for k in mine)
    assert np.sqrt(error / scale) <= tolerance
