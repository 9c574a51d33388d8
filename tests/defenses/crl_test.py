"""CRL: the triplets, whose centroid follows the model, and the divergence.

Mutants:
  `(1 - near) - (1 - far) + margin` -> `(1 - far) - (1 - near) + margin`
  `return summed / total` -> `return jax.lax.stop_gradient(summed / total)`
  `benign_start.logits, benign_now.logits` -> `benign_now.logits, benign_start.logits`
  `distances.attended(benign)` -> `benign.weights`
  `            hp.margin_harmful,` -> `            hp.margin_benign,`
  `distances.cosine(h_SxBxLxD, h0_SxBxLxD)` -> `distances.cosine(h_SxBxLxD, b0_SxBxLxD)`
  `centroid(h_SxBxLxD, harmful.weights)` -> `centroid(h0_SxBxLxD, harmful.weights)`
  `total = x_SxBxL.shape[0] * jnp` -> `total = jnp`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import crl

from ..conftest import batch
from . import common

LAYERS = (1, 2)


@functools.cache
def data():
    """Answers of two lengths."""
    found = {"harmful": batch(1), "benign": batch(2)}
    for part in found.values():
        part.weights[0, 3:] = 0
    return found


def away():
    return tree.add_scale(common.params(), 0.5, common.params(9))


@jax.jit
def compiled(weights, hp, found):
    ctx = common.context(hp)
    return crl.direction(ctx, weights, found, common.KEY)


def run(weights=None, found=None, **settings):
    hp = jax.tree.map(float, crl.Hparams(layers=LAYERS, **settings))
    weights = common.params() if weights is None else weights
    return compiled(weights, hp, found or data())


def distance(x, y):
    lengths = jnp.sqrt(jnp.sum(x**2, -1) * jnp.sum(y**2, -1))
    return 1 - jnp.sum(x * y, -1) / lengths


def expected(weights, alpha=0.5, beta=0.4, gamma=0.9, margins=(0.3, 0.5)):
    """The loss from its formulas: selected tokens, loops over layers."""
    harmful, benign = data()["harmful"], data()["benign"]
    now, start = weights, common.params()
    at_b, at_h = benign.weights > 0, harmful.weights > 0

    def states(w, tokens, layer):
        return common.MODEL(w, tokens).hidden["resid"][layer - 1]

    total = 0.0
    for layer in LAYERS:
        b, b0 = (states(w, benign.tokens, layer)[at_b] for w in (now, start))
        h, h0 = (states(w, harmful.tokens, layer)[at_h] for w in (now, start))
        c = jnp.mean(h, 0, keepdims=True)
        kept = jnp.maximum(distance(b0, b) - distance(b, c) + margins[0], 0)
        moved = jnp.maximum(distance(h, c) - distance(h, h0) + margins[1], 0)
        total += (alpha * jnp.mean(kept) + beta * jnp.mean(moved)) / len(LAYERS)
    real = np.arange(6)[None] < np.array([3, 5, 5, 5])[:, None]
    p0, p = (
        jax.nn.log_softmax(common.MODEL(w, benign.tokens).logits[real])
        for w in (start, now)
    )
    return total + gamma * jnp.mean(jnp.sum(jnp.exp(p0) * (p0 - p), -1))


def test_gradient_is_that_of_the_formulas():
    """Catches a sign, a margin, a mask, a frozen centroid, KL the other way round."""
    grads, metrics = run(away())
    wanted = jax.jit(jax.value_and_grad(expected))(away())
    common.close(grads, wanted[1], rtol=1e-8, atol=1e-11)
    value = 0.5 * metrics["triplet/benign"] + 0.4 * metrics["triplet/harmful"]
    value += 0.9 * metrics["divergence/benign"]
    np.testing.assert_allclose(value, wanted[0], rtol=1e-10)


def test_at_the_start():
    """d(b0, b) = d(h, h0) = 0, no divergence. Catches a reference that is not frozen."""
    _, metrics = run(margin_benign=2.0, margin_harmful=0.0)
    harmful, benign = data()["harmful"], data()["benign"]
    hidden = [common.MODEL(common.params(), d.tokens).hidden for d in (harmful, benign)]
    to_center = []
    for states, part in zip(hidden, (harmful, benign), strict=True):
        near = []
        for layer in range(2):
            c = jnp.mean(hidden[0]["resid"][layer][harmful.weights > 0], 0)
            near.append(distance(states["resid"][layer][part.weights > 0], c[None]))
        to_center.append(jnp.mean(jnp.stack(near)))
    np.testing.assert_allclose(metrics["triplet/harmful"], to_center[0], rtol=1e-9)
    np.testing.assert_allclose(metrics["triplet/benign"], 2 - to_center[1], rtol=1e-9)
    np.testing.assert_allclose(metrics["divergence/benign"], 0.0, atol=1e-14)


def test_divergence_alone_is_at_rest_at_the_start():
    """alpha = beta = 0. Catches a triplet that its weight does not scale."""
    grads, _ = run(alpha=0.0, beta=0.0)
    common.close(grads, jax.tree.map(jnp.zeros_like, grads), atol=1e-14)


def test_satisfied_triplets_ask_for_nothing():
    """Margins of -3. Catches a missing relu."""
    grads, metrics = run(away(), gamma=0.0, margin_benign=-3.0, margin_harmful=-3.0)
    common.equal(grads, jax.tree.map(jnp.zeros_like, grads))
    assert metrics["triplet/benign"] == metrics["triplet/harmful"] == 0


def test_what_follows_an_answer_does_not_matter():
    """Catches padding, or the last token alone, in the means."""
    whole, _ = run(away())
    other = {k: type(v)(v.tokens.copy(), v.weights) for k, v in data().items()}
    for part in other.values():
        part.tokens[:, 5] = (part.tokens[:, 5] + 1) % 11
        part.tokens[0, 3:] = 7
    common.close(run(away(), other)[0], whole, rtol=1e-10, atol=1e-13)


def test_centroid():
    """Mean over tokens, not over rows' means; one a layer."""
    states = jnp.arange(8.0).reshape(2, 2, 2, 1)
    weights = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    found = crl.centroid(states, weights)
    np.testing.assert_allclose(found.reshape(-1), [1.0, 5.0])
    assert found.shape == (2, 1, 1, 1)


def test_microbatches_are_refused():
    """The centroid is that of all rows. Catches a setting that is silently ignored."""
    with pytest.raises(errors.UserError, match="microbatches"):
        crl.streams(crl.Hparams(microbatches=2))
