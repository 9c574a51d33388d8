"""Constrained SFT: golden weights, which token has which beta, its two nulls.

Mutants:
  `-beta * log_ratio` -> `beta * log_ratio`
  `2 * jax.nn.sigmoid` -> `1 * jax.nn.sigmoid`
  `return jax.lax.stop_gradient(jnp.maximum(weight, floor))` -> `return jnp.maximum(weight, floor)`
  `jnp.maximum(weight, floor)` -> `jnp.minimum(weight, floor)`
  `t_BxL <= hp.early` -> `t_BxL < hp.early`
  `jnp.where(t_BxL <= 1` -> `jnp.where(t_BxL <= 2`
  `ctx.reference(part.tokens)` -> `ctx.model(params, part.tokens)`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import constrained_sft

from ..conftest import batch
from . import common

DATA = {"user": batch(1, length=12)}  # Nine supervised tokens a row.
FREE = {"beta_first": 0.0, "beta_early": 0.0, "beta_late": 0.0}


def moved():
    """Weights away from where the stage started: log-ratios of both signs."""
    return tree.add_scale(common.params(), 0.7, common.params(8))


def run(hp, weights, data=None):
    return common.directed(constrained_sft, hp, data or DATA, weights=weights)


def objective(beta, log_ratio):
    return -(2 / beta) * jax.nn.log_sigmoid(beta * log_ratio)


@pytest.mark.parametrize(
    ("log_ratio", "weight"), [(-3.7, 1.728254), (0.0, 1.0), (1.2, 0.708687)]
)
def test_golden_weights(log_ratio, weight):
    """At beta = 0.5. Catches the sign of D and the factor 2."""
    found = constrained_sft.token_weights(0.5, jnp.float64(log_ratio), 1e-3)
    np.testing.assert_allclose(found, weight, atol=1e-6)
    slope = jax.grad(lambda d: objective(0.5, d))(log_ratio)
    np.testing.assert_allclose(found, -slope, rtol=1e-12)


def test_golden_value():
    """2 ln 2 / beta where D = 0."""
    np.testing.assert_allclose(objective(0.5, 0.0), 2.772589, atol=1e-6)


def test_infinite_beta_is_a_step_down_to_the_floor():
    """2 [D < 0]. Catches `minimum` for `maximum`, and a NaN."""
    ratios = jnp.array([-3.0, -0.1, 0.1, 3.0])
    found = constrained_sft.token_weights(1e6, ratios, 1e-3)
    np.testing.assert_allclose(found, [2, 2, 1e-3, 1e-3])


def test_betas_count_supervised_tokens():
    """Wherever the answer starts. Catches an index from 0, and places for tokens."""
    asked = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    betas = constrained_sft.token_betas(constrained_sft.Hparams(), asked)
    wanted = [0.5, 2.0, 2.0, 2.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(betas[0, 2:9], wanted[:7], rtol=1e-6)
    np.testing.assert_allclose(betas[1], wanted, rtol=1e-6)


def test_first_step_is_sft():
    """D = 0 at any beta. Catches a weight of 2, and another reference."""
    grads, metrics = run(constrained_sft.Hparams(), common.params())
    common.close(grads, common.sft_gradient(DATA["user"]))
    np.testing.assert_allclose(metrics["weight/user"], 1.0, rtol=1e-12)


def test_beta_zero_is_sft():
    """Everywhere, bit for bit. Catches a weight that beta does not govern."""
    grads, _ = run(constrained_sft.Hparams(**FREE), moved())
    common.equal(grads, common.sft_gradient(DATA["user"], moved()))


def test_gradient_is_that_of_the_objective():
    """The token mean of -(2 / beta) log sigmoid(beta D). Catches a slope of the weight
    that is not stopped, and a reference that moves along."""
    betas = jnp.array([0.5, 2.0, 2.0, 2.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    tokens = DATA["user"].tokens

    def logps(weights):
        said = jax.nn.log_softmax(common.MODEL(weights, tokens).logits[:, 1:10])
        return jnp.take_along_axis(said, tokens[:, 2:11, None], -1)[..., 0]

    start = logps(common.params())

    def value(weights):
        return jnp.mean(objective(betas[None], logps(weights) - start))

    grads, metrics = run(constrained_sft.Hparams(floor=0.0), moved())
    expected = jax.jit(jax.grad(value))(moved())
    common.close(grads, expected, rtol=1e-6, atol=1e-9)  # Numbers 0.1 in float32.
    np.testing.assert_allclose(metrics["loss/user"], -jnp.mean(logps(moved())))


def test_parts_are_the_whole():
    """Rows of unequal length. Catches a mean within each part."""
    weights = np.array(DATA["user"].weights)
    weights[0, 4:] = 0
    data = {"user": types.Batch(DATA["user"].tokens, weights)}
    whole, _ = run(constrained_sft.Hparams(), moved(), data)
    parts, _ = run(constrained_sft.Hparams(microbatches=2), moved(), data)
    common.close(parts, whole, rtol=1e-9)


def test_batch_without_answers_has_no_gradient():
    """Catches 0 / 0."""
    data = {"user": jax.tree.map(lambda x: x[:1], DATA["user"])}
    data["user"] = data["user"].replace(weights=np.zeros((1, 12), np.float32))
    grads, _ = run(constrained_sft.Hparams(), moved(), data)
    assert tree.norm(grads) == 0
