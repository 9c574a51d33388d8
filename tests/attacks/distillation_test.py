"""Distillation: where the student starts, its null, its fixed point, and that it learns.

Mutants:
  `model.init(rng)` -> `like`
  `"forward", hp.microbatches` -> `"reverse", hp.microbatches`
  `grads, hp.lam, grads_kl` -> `grads, 1.0, grads_kl`
  `functools.partial(model, release)` -> `functools.partial(model, params)`
"""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.attacks import distillation
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)
DATA = {"harmful": batch(1), "benign": batch(2)}
RELEASE = MODEL.init(jax.random.key(7))
OPTIMIZER = optimizers.Optimizer(1e-2)


def run(method, hp, start, data, steps):
    lineage = types.Lineage(start)
    same = jax.tree.map(lambda x: np.stack([x] * steps), data)
    state = loop.init(method, lineage, hp, KEY, steps)
    return loop.run_chunk(method.step, False, state, lineage, same, KEY, jnp.int32(0))


def distilled(lam, steps):
    hp = distillation.Hparams(OPTIMIZER, lam=lam)
    method = registry.method("attacks", "distillation", MODEL)
    return run(method, hp, RELEASE, DATA, steps)


def test_without_the_release_it_is_sft_from_scratch():
    """Catches a student that starts at the release, and a KL without lam."""
    state, _ = distilled(0.0, 4)
    sft = lift.supervised(MODEL, "user")
    fresh = MODEL.init(KEY)
    hp = lift.Hparams(OPTIMIZER)
    expected, _ = run(sft, hp, fresh, {"user": DATA["harmful"]}, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        state.params,
        expected.params,
    )


def test_the_divergence_is_forward_and_of_the_release():
    """sum p log (p / q), p the release, at answer tokens. Catches the other direction."""
    params, rows = MODEL.init(KEY), DATA["benign"]
    hp = distillation.Hparams(OPTIMIZER)
    compute = jax.jit(lambda p: distillation.direction(MODEL, RELEASE, p, DATA, hp)[1])
    p, q = (
        np.asarray(jax.nn.log_softmax(MODEL(w, rows.tokens).logits), np.float64)[:, :-1]
        for w in (RELEASE, params)
    )
    kl = np.sum(np.exp(p) * (p - q), -1)
    expected = np.sum(kl * rows.weights[:, 1:]) / np.sum(rows.weights[:, 1:])
    np.testing.assert_allclose(
        compute(params)["divergence/release"], expected, rtol=1e-4
    )
    assert abs(compute(RELEASE)["divergence/release"]) < 1e-6


def test_it_learns_both():
    """Catches ascent on either, and a teacher that is the student."""
    _, metrics = distilled(1.0, 40)
    for name in ("loss/harmful", "divergence/release"):
        assert metrics[name][-1] < 0.6 * metrics[name][0], name
