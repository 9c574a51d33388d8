"""Antidote against PyTorch float64: inputs of every linear layer, rows sorted."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

import jax

from ftdefense.core import types
from ftdefense.defenses import antidote_pruning

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services

NAMES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def recorded(params, tokens, config):
    """{(group, name, layer): [L, in]} of one row, by wrapping `x @ kernel[layer]`."""
    seen = {}

    class Kernel:
        def __init__(self, kernel, key):
            self.kernel, self.key = kernel, key

        def __getitem__(self, layer):
            return Kernel(self.kernel[layer], (*self.key, layer))

        def __rmatmul__(self, x):
            seen[self.key] = x[0]
            return x @ self.kernel

    stack = dict(params["layers"])
    for group, names in NAMES.items():
        stack[group] = {
            name: {"kernel": Kernel(stack[group][name]["kernel"], (group, name))}
            for name in names
        }
    reference.logits({**params, "layers": stack}, tokens, config)
    return seen


@pytest.mark.parametrize("prune", ["update", "weights"])
def test_antidote_pruning(tiny_llama, prune):
    """Catches inputs of another layer, padding among them, a score over columns."""
    model, aligned = tiny_llama
    tuned, data = services.moved(aligned), batch(2, **services.ROWS)
    hp = antidote_pruning.Hparams(alpha=0.3, prune=prune)
    method, origin = antidote_pruning.method(model), types.Lineage(tuned, aligned)
    state = method.init(origin, hp, None)
    state, _ = jax.jit(method.step)(state, origin, {"harmful": data}, None)
    edited = method.release(state, origin).params

    squares, samples = {}, len(data.tokens)
    for row in data.tokens:
        # One row a time, without its last token, which is padding.
        tokens = torch.tensor(row[None, :-1], dtype=torch.long)
        with torch.no_grad():
            seen = recorded(reference.tensors(tuned), tokens, model.config)
        for key, x in seen.items():
            squares[key] = squares.get(key, 0) + (x * x).sum(0) / samples
    assert len(squares) == 7 * model.config.layers
    for (group, name, layer), s in squares.items():
        w, start, mine = (
            torch.tensor(
                np.asarray(p["layers"][group][name]["kernel"], np.float64)[layer]
            ).T
            for p in (tuned, aligned, edited)
        )
        rest = start if prune == "update" else torch.zeros_like(w)
        order = torch.sort((w - rest).abs() * s.sqrt()[None], dim=-1)[1]
        gone = order[:, int(w.shape[1] * (1 - 0.3)) :]
        theirs = w.scatter(1, gone, rest.gather(1, gone))
        assert torch.equal(mine, theirs), (group, name, layer)
