"""Safe LoRA against the published rule on factors, in PyTorch's layout and float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

import jax

from ftdefense.core import types
from ftdefense.defenses import safe_lora
from ftdefense.methods import adapters

from . import services_torch as services

TARGETS = ("q", "v", "up", "down")


def theirs(base, aligned, factors, count, scale):
    """Merged weights: of each module B becomes C B, if its cosine is small."""
    v = aligned - base
    c = v @ v.T / torch.linalg.norm(v)
    b, a = factors
    ba, cba = b @ a, c @ b @ a
    cosine = torch.nn.functional.cosine_similarity(cba.flatten(), ba.flatten(), dim=0)
    return np.round(cosine.item(), 5), aligned + scale * ba, aligned + scale * cba


@pytest.mark.parametrize("count", [3, 8])
def test_safe_lora(tiny_llama, count):
    """Catches a transposed C, and an update that is not the adapter's."""
    _, pretrained = tiny_llama
    aligned = services.moved(pretrained, 6)
    lora = adapters.LoRA(alpha=8.0, rank=3, targets=TARGETS)
    factors = services.moved(lora.init(aligned, jax.random.key(4)), 7)
    tuned = lora.merge(factors, aligned)
    hp = safe_lora.Hparams(count=count)
    edited = safe_lora.edit(types.Lineage(tuned, aligned, pretrained), hp)

    def at(tree, group, name, layer):
        return torch.tensor(np.asarray(tree["layers"][group][name], np.float64)[layer])

    modules = {}
    for group, names in (("attention", "qv"), ("mlp", ("up", "down"))):
        for name in names:
            for layer in range(2):
                base, start = (
                    torch.tensor(
                        np.asarray(w["layers"][group][name]["kernel"], np.float64)[
                            layer
                        ]
                    ).T
                    for w in (pretrained, aligned)
                )
                a, b = (
                    torch.tensor(
                        np.asarray(factors["layers"][group][name][f], np.float64)[layer]
                    ).T
                    for f in "ab"
                )
                modules[group, name, layer] = theirs(base, start, (b, a), count, 8 / 3)
    limit = sorted(cosine for cosine, *_ in modules.values())[count - 1]
    for (group, name, layer), (cosine, plain, projected) in modules.items():
        mine = np.asarray(edited["layers"][group][name]["kernel"])[layer].T
        wanted = (projected if cosine <= limit else plain).numpy()
        error = np.linalg.norm(mine - wanted) / np.linalg.norm(wanted)
        assert error <= 1e-5, (group, name, layer)
