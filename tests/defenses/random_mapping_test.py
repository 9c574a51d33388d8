"""Random mapping: its null, both coefficients, and which batch each term reads.

Mutants:
  `hp.lam_retain * g` -> `g`
  `grads, hp.lam, grad_m` -> `grads, 1.0, grad_m`
  `grads, hp.lam, grad_m` -> `grads, -hp.lam, grad_m`
  `(params, batches["harmful"], rng_harmful)` -> `(params, batches["retain"], rng_harmful)`
  `ctx.model, hp.table_seed, hp.microbatches` -> `ctx.model, 0, hp.microbatches`
  `rng=rng, attended=seen` -> `rng=rng` in objectives/random_mapping.py
  `1 - jnp.abs(cosines_NxBxL)` -> `1 - cosines_NxBxL` in objectives/random_mapping.py
  `_length(hidden_NxBxLxD) * _length(vectors_1xBxLxD)` -> `_length(hidden_NxBxLxD)` in objectives/random_mapping.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.defenses import random_mapping
from ftdefense.objectives import distances
from ftdefense.objectives import random_mapping as objective

from ..conftest import batch
from . import common

DATA = {"harmful": batch(2), "retain": batch(1)}


@jax.jit
def run(hp, weights):
    ctx = common.context(hp)
    return random_mapping.direction(ctx, weights, DATA, common.KEY)


def directed(weights=None, **settings):
    hp = jax.tree.map(jnp.asarray, random_mapping.Hparams(**settings))
    return run(hp, common.params() if weights is None else weights)


@jax.jit
@jax.value_and_grad
def mapping(weights, vectors):
    """The mapping loss, layer by layer."""
    rows = DATA["harmful"]
    seen = distances.attended(rows)
    hidden = common.MODEL(weights, rows.tokens, attended=seen).hidden
    total = 0.0
    for state in (hidden["embed"], hidden["resid"][0], hidden["final"]):
        lengths = (jnp.linalg.norm(x, axis=-1) for x in (state, vectors))
        cosine = jnp.sum(state * vectors, -1) / next(lengths) / next(lengths)
        total += jnp.mean(1 - jnp.abs(cosine)) / 3
    return total


def test_reduces_to_sft_on_retain():
    """lam = 0, exactly. Catches a mapping term outside lam."""
    grads, _ = directed(lam=0.0)
    ctx = common.context(random_mapping.Hparams())
    expected = jax.jit(jax.grad(ctx.loss))(common.params(), DATA["retain"])
    common.close(grads, expected, rtol=1e-13, atol=1e-15)


def test_gradient_is_the_weighted_sum():
    """Catches a coefficient left out, a sign, the terms' batches swapped, or padding
    that reads padding.
    """
    grads, metrics = directed(lam=0.7, lam_retain=0.4, table_seed=3)
    vectors = objective.vectors(DATA["harmful"].tokens, common.MODEL.width, 3)
    value, gradient = mapping(common.params(), vectors)
    np.testing.assert_allclose(metrics["loss/mapping"], value, rtol=1e-6)
    expected = common.combine(
        (0.4, common.sft_gradient(DATA["retain"])), (0.7, gradient)
    )
    common.close(grads, expected, rtol=1e-5, atol=1e-7)


def test_descent_lowers_the_mapping_loss():
    """Catches ascent."""
    weights = common.params()
    grads, before = directed(weights, lam_retain=0.0)
    _, after = directed(tree.add_scale(weights, -0.1, grads), lam_retain=0.0)
    assert after["loss/mapping"] < before["loss/mapping"] - 1e-3
