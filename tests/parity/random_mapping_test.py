"""Random mapping's direction against PyTorch float64, same weights and vectors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import random_mapping
from ftdefense.objectives import random_mapping as objective

from ..conftest import batch
from . import hidden_torch
from . import llama_torch
from . import services_torch


def test_random_mapping(tiny_llama):
    """Catches positions or a layer left out, a cosine that keeps its sign, and padding
    that attends to padding.
    """
    model, params = tiny_llama
    harmful, retain = (
        hidden_torch.ragged(batch(i, **services_torch.ROWS)) for i in (1, 2)
    )
    hp = random_mapping.Hparams(lam=0.7, lam_retain=0.4, table_seed=3)
    w = llama_torch.tensors(params)
    vectors = objective.vectors(harmful.tokens, model.config.width, 3)
    vectors = torch.tensor(np.asarray(vectors, np.float64))
    attended = hidden_torch.real(harmful)
    states = hidden_torch.forward(
        w, harmful.tokens, model.config, attended=attended
    ).states
    assert len(states) == model.config.layers + 1
    aside = [
        (1 - torch.cosine_similarity(h, vectors, dim=-1).abs()).mean() for h in states
    ]
    value = 0.4 * llama_torch.loss(w, retain, model.config)
    value = value + 0.7 * torch.stack(aside).mean()
    theirs = llama_torch.gradient(value, w)
    data = {"harmful": harmful, "retain": retain}
    mine, _ = services_torch.direction(random_mapping, model, params, data, hp)
    assert services_torch.relative_error(mine, theirs) <= 1e-5
