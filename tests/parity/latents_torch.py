"""The PyTorch Llama with shifts of its embeddings and of its MLPs' outputs."""

import numpy as np
import torch

from . import llama_torch as llama


def logits(params, tokens, config, embed, mlp):
    """[B, L, V]; `embed` [B, L, D] and `mlp[layer]` [B, L, D] are added where they say."""
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    x = params["embed"]["embedding"][ids] + embed
    length, stack, epsilon = tokens.shape[1], params["layers"], config.norm_epsilon
    later = torch.ones(length, length).tril() == 0
    for layer, shift in enumerate(mlp):
        kernel = {n: stack["attention"][n]["kernel"][layer] for n in "qkvo"}
        y = llama._norm(x, stack["attention_norm"]["scale"][layer], epsilon)
        q, k, v = ((y @ kernel[n]).unflatten(-1, (-1, config.head_dim)) for n in "qkv")
        q, k = (llama._rotate(h, config.rope_theta) for h in (q, k))
        k, v = (h.repeat_interleave(config.heads // config.kv_heads, 2) for h in (k, v))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / config.head_dim**0.5
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        x = x + torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2) @ kernel["o"]
        y = llama._norm(x, stack["mlp_norm"]["scale"][layer], epsilon)
        gate, up, down = (
            stack["mlp"][n]["kernel"][layer] for n in ("gate", "up", "down")
        )
        x = x + torch.nn.functional.silu(y @ gate) * (y @ up) @ down + shift
    x = llama._norm(x, params["final_norm"]["scale"], epsilon)
    return x @ params["lm_head"]["kernel"]
