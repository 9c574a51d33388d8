"""AntiDote's network and both its directions against PyTorch float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import types
from ftdefense.defenses import antidote
from ftdefense.methods import lift

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services

RANK, WIDTH, HEADS = 2, 8, 2
HP = antidote.Hparams(dropout=0.0, rank=RANK, width=WIDTH, heads=HEADS, scale=0.3)


def linear(module, x):
    return x @ module["kernel"] + module["bias"]


def written(phi, x, name):
    """(U^T, V^T) of one kernel in one layer, by PyTorch's own modules."""
    x = linear(phi["read"][str(x.shape[-1])], x.reshape(-1, x.shape[-1]))
    x, _ = torch.nn.functional.multi_head_attention_forward(
        *(x[:, None],) * 3,
        WIDTH,
        HEADS,
        phi["qkv"]["kernel"].T,
        phi["qkv"]["bias"],
        None,
        None,
        False,
        0.0,
        phi["out"]["kernel"].T,
        phi["out"]["bias"],
    )
    x = x[:, 0].mean(0)
    for i in range(2):
        block = phi["body"][str(i)]
        scale, bias = block["norm"]["scale"], block["norm"]["bias"]
        y = torch.nn.functional.layer_norm(x, (WIDTH,), scale, bias)
        y = torch.nn.functional.gelu(linear(block["up"], y))
        x = x + linear(block["down"], y)
    u = linear(phi["a"][name], x).reshape(RANK, -1)
    return u.T, linear(phi["b"][name], x).reshape(-1, RANK).T


def read(params, tokens, config):
    """What q, k, v and o read in every layer, constant."""
    seen = {name: [] for name in "qkvo"}

    def kernels(name):
        stack = params["layers"]["attention"][name]["kernel"].detach()
        return [Watched(stack[i], seen[name]) for i in range(config.layers)]

    attention = {name: {"kernel": kernels(name)} for name in "qkvo"}
    layers = {**params["layers"], "attention": attention}
    reference.logits({**params, "layers": layers}, tokens, config)
    return {name: [x.detach() for x in xs] for name, xs in seen.items()}


class Watched:
    """A matrix that keeps what it is multiplied with."""

    def __init__(self, matrix, seen):
        self.matrix, self.seen = matrix, seen

    def __rmatmul__(self, x):
        self.seen.append(x)
        return x @ self.matrix


def patched(params, phi, tokens, config):
    """Parameters with U and V multiplied out and added."""
    inputs = read(params, tokens, config)
    attention = dict(params["layers"]["attention"])
    for name in "qkvo":
        factors = [written(phi, x, name) for x in inputs[name]]
        shift = torch.stack([0.3 * a @ b for a, b in factors])
        attention[name] = {"kernel": attention[name]["kernel"] + shift}
    return {**params, "layers": {**params["layers"], "attention": attention}}


def preference(params, start, chosen, rejected, config):
    margin = 0.0
    for rows, sign in ((chosen, 1), (rejected, -1)):
        for weights, factor in ((params, sign), (start, -sign)):
            nats, asked = services.token_nats(weights, rows, config)
            margin = margin - factor * (nats * asked).sum(-1)
    return ((margin - 5) ** 2).mean()


def test_antidote(tiny_llama):
    """Catches another order of the network's parts, U and V confused, a gradient through
    the patch or none into it, answers or padding for all tokens, and means for sums."""
    model, first = tiny_llama
    config, params = model.config, services.moved(first)
    data = {
        role: batch(i, **services.ROWS)
        for i, role in enumerate(("harmful", "refusal", "benign"))
    }
    ctx = lift.context(model, types.Lineage(first, first), HP)
    phi = antidote.memory(ctx, params, jax.random.key(2)).phi
    phi = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), phi
    )

    @jax.jit
    def ours(params, phi, data):
        inputs, key = model.inputs(params, data["harmful"].tokens), jax.random.key(0)
        patch = antidote.write(ctx, phi, inputs)
        return (
            antidote.adversary_direction(ctx, params, data, None, phi, inputs)[0],
            antidote.direction(ctx, params, data, key, patch)[0],
        )

    grads_phi, grads = map(services.flat, ours(params, phi, data))
    start, w, net = (reference.tensors(x) for x in (first, params, phi))
    tokens = torch.tensor(data["harmful"].tokens, dtype=torch.long)
    pair = data["harmful"], data["refusal"]

    value = preference(patched(w, net, tokens, config), start, *pair, config)
    theirs = reference.gradient(value, net)
    assert services.relative_error(grads_phi, theirs) <= 1e-5

    constant = reference.tensors(phi)
    attacked = patched(w, constant, tokens, config)
    value = preference(attacked, start, *pair[::-1], config)
    rows = data["benign"]
    nats, asked = services.token_nats(w, rows, config)
    ids = torch.tensor(rows.tokens, dtype=torch.long)
    before, after = (
        reference.logits(x, ids, config).log_softmax(-1) for x in (start, w)
    )
    # Of nine tokens the last is padding.
    kl = (before.exp() * (before - after)).sum(-1)[:, :8].mean()
    value = value + 0.8 * (nats * asked).sum() / asked.sum() + 0.3 * kl
    theirs = reference.gradient(value, w)
    assert services.relative_error(grads, theirs) <= 1e-5
    assert np.sqrt(sum(np.sum(x**2) for x in grads_phi.values())) > 0
