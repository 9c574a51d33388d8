"""RepNoise: nulls, signs and masks, in float64 on the toy.

Mutants:
  `hp.beta * noise - hp.alpha * ascent` -> `hp.beta * noise + hp.alpha * ascent`
  `+ hp.beta * noise` -> `- hp.beta * noise`
  `wanted = lens.targets(refusal, harmful, hp.mask)` -> `wanted = lens.targets(harmful, refusal, hp.mask)`
  `mmd(x_BxF, z_BxF) / layers` -> `mmd(x_BxF, z_BxF)` in objectives/distances.py
  `(cotangent * gradient_NxBxLxD)` -> `(gradient_NxBxLxD)` in objectives/distances.py
  `all_real = hp.mask == "response"` -> `all_real = hp.mask != "response"`
  `for rows in (x_BxLxD, z_BxLxD)` -> `for rows in (x_BxLxD, x_BxLxD)` in objectives/distances.py
  `jnp.log(lens.ascent(ctx.readout, w, outputs, unwanted))` -> `lens.ascent(ctx.readout, w, outputs, unwanted)`
  `attended=distances.attended(harmful)` -> `attended=None`
  `attended=distances.attended(refusal)` -> `attended=None`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import repnoise
from ftdefense.methods import lift
from ftdefense.models import toy
from ftdefense.objectives import distances
from ftdefense.objectives import lens

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def params():
    start = MODEL.init(jax.random.key(3))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), start)


HARMFUL_ENDS, REFUSAL_ENDS = np.array([[5, 3, 5, 4], [3, 5, 4, 5]])


def real(ends):
    """[4, 6]: 1 before the padding."""
    return (np.arange(6)[None] < ends[:, None]).astype(np.float64)


def pairs():
    harmful, refusal = batch(1), batch(2)
    refusal.tokens[:, :2] = harmful.tokens[:, :2]
    harmful.weights[:] *= real(HARMFUL_ENDS)
    refusal.weights[:] *= real(REFUSAL_ENDS)
    return {"harmful": harmful, "refusal": refusal, "benign": batch(3)}


@jax.jit
def run(weights, hp, data):
    ctx = lift.context(MODEL, types.Lineage(weights), hp)
    return repnoise.direction(ctx, weights, data, KEY)


def direction(data=None, **settings):
    hp = jax.tree.map(float, repnoise.Hparams(**settings))
    return run(params(), hp, data or pairs())


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-13), a, b
    )


@pytest.mark.parametrize("mask", lens.MASKS)
def test_reduces_to_refusal_sft(mask):
    """alpha = beta = 0. Catches the harmful text's targets in the stability term, and
    padding that reads padding.
    """
    data = pairs()
    asked = lens.targets(data["refusal"], data["harmful"], mask)

    def loss(w):
        outputs = MODEL(w, data["refusal"].tokens, attended=real(REFUSAL_ENDS))
        return lens.cross_entropy(outputs.logits, asked)

    grads, _ = direction(mask=mask, alpha=0.0, beta=0.0)
    close(grads, jax.jit(jax.grad(loss))(params()))


@pytest.mark.parametrize("mask", lens.MASKS)
def test_is_the_sum_of_its_terms(mask):
    """Catches a sign, a factor, the other mask, noise without it, padding that is seen."""
    data = pairs()
    unwanted = lens.targets(data["harmful"], data["refusal"], mask)
    where = lens.divergence(data["harmful"], data["refusal"])
    if mask == "response":
        where = real(HARMFUL_ENDS)
    rngs = jax.random.split(jax.random.split(KEY, 4)[3], 2)

    def terms(w):
        outputs = MODEL(w, data["harmful"].tokens, attended=real(HARMFUL_ENDS))
        noise = 0.0
        for i, mlp in enumerate(outputs.hidden["mlp"]):
            z = jax.random.normal(rngs[i], mlp.shape, mlp.dtype)
            u, z = ((x * where[..., None]).reshape(4, -1) for x in (mlp, z))
            noise += distances.mmd(u, z) / 2
        ascended = lens.ascent(MODEL.readout, w, outputs, unwanted)
        return 0.7 * noise - 0.4 * jnp.log(ascended)

    stability, _ = direction(mask=mask, alpha=0.0, beta=0.0)
    extra = jax.jit(jax.grad(terms))(params())
    grads, metrics = direction(mask=mask, alpha=0.4, beta=0.7)
    close(grads, tree.add_scale(stability, 1.0, extra))
    assert metrics["ascent/harmful"] > 0


def test_rehearsal_adds_the_benign_loss():
    """Catches a rehearsal that replaces a term, or another batch."""
    null = {"mask": "response", "alpha": 0.0, "beta": 0.0}
    plain, _ = direction(**null)
    grads, metrics = direction(rehearse=True, **null)
    loss = lift.context(MODEL, types.Lineage(params()), repnoise.Hparams()).loss
    value, sft = jax.jit(jax.value_and_grad(loss))(params(), pairs()["benign"])
    close(grads, tree.add_scale(plain, 1.0, sft))
    close(metrics["loss/benign"], value)
    assert "benign" not in repnoise.streams(repnoise.Hparams())


def test_equal_pairs_leave_nothing():
    """m = 0 everywhere: zero, not NaN. Catches an unguarded mean or bandwidth."""
    data = pairs()
    grads, _ = direction({**data, "refusal": data["harmful"]})
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), grads)


def test_noise_is_fresh():
    """Catches a key that the step does not reach."""
    mlp, mask = jnp.ones((2, 4, 6, 8)), jnp.ones((4, 6))
    distance = jax.jit(distances.to_noise)
    one, two = (distance(mlp, mask, jax.random.key(i)) for i in (0, 1))
    assert one != two


def test_microbatches_are_refused():
    """Catches a setting that is silently ignored."""
    with pytest.raises(errors.UserError, match="microbatches"):
        repnoise.streams(repnoise.Hparams(microbatches=2))
