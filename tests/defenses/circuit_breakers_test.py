"""Circuit breakers: the two terms, their schedule, and the start.

Mutants:
  `(ctx.step + 1) / (2 *` -> `(ctx.step + 0) / (2 *`
  `progress * moved + (1 - progress) * turned` -> `progress * turned + (1 - progress) * moved`
  `jax.nn.relu(cosine_SxBxL)` -> `cosine_SxBxL`
  `layers[-1] + 1 if hp.drop` -> `layers[-1] + 2 if hp.drop`
  `tokens = len(layers) * jnp` -> `tokens = jnp`
  `                distances.attended(harmful),` -> `                harmful.weights,`
  `there_SxBxLxD += jitter` -> `there_SxBxLxD -= 0 * jitter`
  `reference(harmful.tokens),` -> `model(w, harmful.tokens),`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import circuit_breakers

from ..conftest import batch
from . import common

STEPS = 10


@functools.cache
def data():
    """Rows of two lengths: the first ends two tokens early."""
    found = {"harmful": batch(1), "retain": batch(2)}
    for part in found.values():
        part.weights[0, 3:] = 0
    return found


def away():
    return tree.add_scale(common.params(), 0.5, common.params(9))


@jax.jit
def compiled(weights, hp, step):
    ctx = common.context(hp, step, STEPS)
    return circuit_breakers.direction(ctx, weights, data(), common.KEY)


def run(weights=None, step=0, **settings):
    hp = jax.tree.map(float, circuit_breakers.Hparams(**settings))
    return compiled(common.params() if weights is None else weights, hp, step)


def states(weights, tokens, blocks):
    """Hidden states of the toy of the first blocks: embedding, blocks, the last one."""
    hidden = common.MODEL(weights, tokens).hidden
    return jnp.stack([hidden["embed"], *hidden["resid"][:blocks]])


def expected(weights, step, layers, blocks, alpha=10.0):
    """The loss from its formulas, with loops and no shared helper."""
    real = np.ones((4, 6))
    real[:, 5:] = 0
    real[0, 3:] = 0
    harmful, retain = data()["harmful"].tokens, data()["retain"].tokens
    h, o = (states(w, harmful, blocks) for w in (weights, common.params()))
    turned = 0.0
    for layer in layers:
        cos = jnp.sum(h[layer] * o[layer], -1)
        cos /= jnp.sqrt(jnp.sum(h[layer] ** 2, -1) * jnp.sum(o[layer] ** 2, -1))
        turned += jnp.sum(jnp.maximum(cos, 0) * real) / real.sum() / len(layers)
    h, o = (states(w, retain, blocks) for w in (weights, common.params()))
    moved = jnp.mean(jnp.sqrt(jnp.sum((h - o) ** 2, -1)) * real[None])
    t = (step + 1) / (2 * STEPS)
    return alpha * (t * moved + (1 - t) * turned)


@pytest.mark.parametrize(
    ("layers", "drop", "blocks"), [((), True, 2), ((0,), True, 1), ((0, 1), False, 2)]
)
def test_gradient_is_that_of_the_formulas(layers, drop, blocks):
    """Catches t from 0, the weights swapped, a squared norm, masks, layers kept."""
    weights, step = away(), 3
    grads, _ = run(weights, step, layers=layers, drop=drop)
    loss = functools.partial(expected, step=step, layers=layers or (1,), blocks=blocks)
    common.close(grads, jax.jit(jax.grad(loss))(weights), rtol=1e-8, atol=1e-11)


def test_at_the_start():
    """C = 1, R = 0, and no way leads on. Catches a reference that moves, a NaN."""
    grads, metrics = run()
    np.testing.assert_allclose(metrics["cosine/harmful"], 1.0, rtol=1e-12)
    assert metrics["distance/retain"] == 0
    common.close(grads, jax.tree.map(jnp.zeros_like, grads), atol=1e-13)


def test_weights_meet_at_the_last_step():
    """t = T: half and half. Catches 2T read as T, or a count from 0."""
    weights = away()
    _, metrics = run(weights, STEPS - 1)
    total = 5 * (metrics["distance/retain"] + metrics["cosine/harmful"])
    loss = expected(weights, STEPS - 1, (1,), 2)
    np.testing.assert_allclose(total, loss, rtol=1e-9)


def test_alpha_zero_is_no_update():
    """Catches a term that alpha does not scale."""
    grads, _ = run(away(), alpha=0.0)
    common.equal(grads, jax.tree.map(jnp.zeros_like, grads))


def turned(h_BxLxD, o_BxLxD, jitter=0.0, seed=0):
    def outputs(x):
        hidden = {"embed": x, "resid": x[None], "final": x}
        return types.Outputs(None, hidden)

    return circuit_breakers.rerouting(
        outputs(h_BxLxD),
        outputs(o_BxLxD),
        jnp.ones((1, 1)),
        (0,),
        jitter,
        jax.random.key(seed),
    )


@pytest.mark.parametrize("h", [[0.0, 2.0], [-1.0, 1.0], [0.0, 0.0]])
def test_orthogonal_opposite_or_zero_is_enough(h):
    """C = 0 without a gradient. Catches a missing relu, and 0 / 0."""
    o = jnp.array([[[3.0, 0.0]]])
    value, grad = jax.jit(jax.value_and_grad(turned))(jnp.array([[h]]), o)
    assert value == 0
    if h != [0.0, 2.0]:  # At a right angle relu has a kink.
        np.testing.assert_array_equal(grad, 0.0)


def test_length_does_not_matter():
    """Catches an inner product without both lengths."""
    h, o = jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 0.5]]])
    np.testing.assert_allclose(turned(5 * h, 0.1 * o), turned(h, o), rtol=1e-12)
    np.testing.assert_allclose(turned(h, o), 4 / np.sqrt(5 * 9.25), rtol=1e-12)


def test_jitter_leaves_the_start():
    """Catches a noise that does not scale, or does not depend on the key."""
    grads, metrics = run(jitter=0.1)
    assert tree.norm(grads) > 1e-3
    assert 0.9 < metrics["cosine/harmful"] < 1
    o = jax.random.normal(jax.random.key(5), (1, 1, 4000))
    angle = jnp.sqrt(1 / turned(o, o, 0.1) ** 2 - 1)
    np.testing.assert_allclose(angle, 0.1, rtol=0.1)
    assert turned(o, o, 0.1, seed=1) != turned(o, o, 0.1)


def test_microbatches_change_nothing():
    """Catches a division by the tokens of a part."""
    weights = away()
    whole, _ = run(weights, 3)
    parts, _ = run(weights, 3, microbatches=2)
    common.close(parts, whole, rtol=1e-9, atol=1e-12)
