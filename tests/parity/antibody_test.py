"""Both stages of Antibody against PyTorch float64, same weights and batches."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import antibody
from ftdefense.defenses import antibody_tuning

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


def dot(a, b):
    return sum((x * b[k]).sum() for k, x in a.items())


@pytest.mark.parametrize("multiplier", antibody.MULTIPLIERS)
def test_antibody(tiny_llama, multiplier):
    """Catches a norm or a product by leaf, refusals at w, a mean before the clamp."""
    model, params = tiny_llama
    roles = ("alignment", "harmful", "refusal")
    data = {role: batch(i, **services.ROWS) for i, role in enumerate(roles)}
    hp = antibody.Hparams(
        alpha=0.3, eta=1.5, momentum=0.6, lam_refusal=0.4, multiplier=multiplier
    )
    memory = {"lam": jnp.float32(2.0)}
    mine, after = services.direction(
        antibody, model, params, data, hp, memory=memory, step=3
    )

    def gradient(w, role):
        return reference.gradient(reference.loss(w, data[role], model.config), w)

    w = reference.tensors(params)
    g_a, g_h = gradient(w, "alignment"), gradient(w, "harmful")
    ahead = reference.stepped(w, g_h, 0.3)
    g_s = services.combine((1, g_h), (-1, gradient(ahead, "harmful")))
    scale = dot(g_s, g_s)
    if multiplier == "cosine":
        scale = (scale * dot(g_a, g_a)).sqrt() + 1e-8
    raw = max(0.0, 1.5 - float(dot(g_a, g_s) / scale))
    lam = 0.6 * 2.0 + 0.4 * raw
    theirs = services.combine((1, g_a), (lam, g_s), (0.4, gradient(ahead, "refusal")))
    assert services.relative_error(mine, theirs) <= 1e-5
    np.testing.assert_allclose(after["lam"], lam, rtol=1e-4)


def ragged(seed):
    """Answers of 2, 4 and 6 tokens."""
    data = batch(seed, **services.ROWS)
    places = np.arange(9)[None]
    last = np.array([[4], [6], [8]])
    return data.replace(weights=((places >= 2) & (places < last)).astype(np.float32))


@pytest.mark.parametrize("score", antibody_tuning.SCORES)
def test_antibody_tuning(tiny_llama, score):
    """Catches weights with a gradient, another normaliser, tokens of the prompt."""
    model, params = tiny_llama
    data = {"user": ragged(1), "user_refusal": ragged(2)}
    hp = antibody_tuning.Hparams(tau=0.7, score=score)
    mine, _ = services.direction(antibody_tuning, model, params, data, hp)
    w = reference.tensors(params)
    sums = {}
    for role, rows in data.items():
        nats, mask = services.token_nats(w, rows, model.config)
        sums[role] = (nats * mask).sum(1), mask.sum(1)
    (answer, n), (refusal, m) = sums["user"], sums["user_refusal"]
    s = refusal / m - answer / n if score == "mean" else refusal - answer
    weights = (s / 0.7).softmax(0).detach()
    value = (weights * answer).sum() / (weights * n).sum().clamp(min=1.0)
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
