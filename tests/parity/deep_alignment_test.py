"""Deep alignment against PyTorch float64, on rows written out token by token."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import types
from ftdefense.defenses import deep_alignment

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


def test_deep_alignment(tiny_llama):
    """Catches a prefix of the wrong row, a supervised prefix, or a mean of two means."""
    model, params = tiny_llama
    harmful, refusal = (batch(i, **services.ROWS) for i in (1, 2))
    anchors = [batch(i, **services.ROWS) for i in (3, 4)]
    # Two tokens of prompt, which the rows of a pair share.
    harmful.tokens[:, :2] = refusal.tokens[:, :2]
    refusal.weights[0, 5:] = 0
    data = {
        "harmful": harmful,
        "refusal": refusal,
        "benign": jax.tree.map(lambda *x: np.stack(x), *anchors),
    }
    hp = deep_alignment.Hparams(augment=0.8, max_prefix=5, anchors=2)
    mine, _ = services.direction(deep_alignment, model, params, data, hp)

    key = jax.random.split(jax.random.key(0), 3)[0]
    prefix = np.asarray(deep_alignment.draw_prefixes(hp, harmful, key))
    assert len(set(prefix.tolist())) > 1
    tokens, weights = np.zeros((3, 14), np.int32), np.zeros((3, 14), np.float32)
    for i, k in enumerate(prefix):
        answer = refusal.tokens[i][refusal.weights[i] > 0]
        row = [*harmful.tokens[i, : 2 + k], *answer]
        tokens[i, : len(row)] = row
        weights[i, 2 + k : len(row)] = 1
    w = reference.tensors(params)
    nats, total = 0.0, 0.0
    for rows in (types.Batch(tokens, weights), *anchors):
        said, asked = services.token_nats(w, rows, model.config)
        nats, total = nats + (said * asked).sum(), total + asked.sum()
    theirs = reference.gradient(nats / total, w)
    assert services.relative_error(mine, theirs) <= 1e-5
