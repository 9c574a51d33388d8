"""Antibody's fine-tuning: N2, what the weights read, and that they are constants.

Mutants:
  `(answers[0] - refusals[0])` -> `(refusals[0] - answers[0])`
  `- refusals[0]) / tau` -> `- refusals[0]) * tau`
  `jax.lax.stop_gradient(jax.nn.softmax(` -> `(jax.nn.softmax(`
  `if score == "mean":` -> `if score == "sum":`
  `jnp.sum(weight_B * count_B), 1.0)` -> `jnp.sum(count_B), 1.0)`
  `jnp.maximum(jnp.sum(weight_B * count_B), 1.0)` -> `jnp.sum(weight_B * count_B)`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.defenses import antibody
from ftdefense.defenses import antibody_tuning
from ftdefense.objectives import losses

from ..conftest import batch
from . import common


def ragged(seed: int) -> types.Batch:
    """Rows of 1 to 3 answer tokens."""
    data = batch(seed)
    counts = np.arange(len(data.weights)) % 3 + 1
    places = np.arange(data.weights.shape[1])
    answer = (places[None] >= 2) & (places[None] < 2 + counts[:, None])
    return data.replace(weights=answer.astype(np.float32))


DATA = {"user": ragged(1), "user_refusal": ragged(2)}


def directed(data=None, **fields):
    hp = antibody_tuning.Hparams(**fields)
    return common.directed(antibody_tuning, hp, data or DATA)


def nats_of_rows(weights, data):
    """(sums of nats, counts) of each row."""
    logits = common.MODEL(weights, data.tokens).logits[:, :-1]
    nats_BxL = losses.cross_entropy(logits, data.tokens[:, 1:])
    return jnp.sum(nats_BxL * data.weights[:, 1:], -1), data.weights[:, 1:].sum(-1)


def test_uniform_weights_are_sft():
    """N2: tau = infinity. Catches a mean of row means, and a loss divided by B."""
    grads, metrics = directed(tau=float("inf"))
    common.close(grads, common.sft_gradient(DATA["user"]), rtol=1e-10)
    np.testing.assert_allclose(metrics["loss/weighted"], metrics["loss/user"])
    np.testing.assert_allclose(metrics["rows/effective"], 4.0)


def test_equal_scores_are_sft():
    """The refusal is the answer. Catches a score that reads one of the two alone."""
    grads, _ = directed({"user": DATA["user"], "user_refusal": DATA["user"]}, tau=0.1)
    common.close(grads, common.sft_gradient(DATA["user"]), rtol=1e-10)


@pytest.mark.parametrize("score", antibody_tuning.SCORES)
def test_by_the_formula(score):
    """Constant weights. Catches a gradient through them, sums for means, the sign."""
    w = common.params()
    (answer, n), (refusal, m) = (
        nats_of_rows(w, DATA[role]) for role in ("user", "user_refusal")
    )
    s = refusal / m - answer / n if score == "mean" else refusal - answer
    weights = np.asarray(jnp.exp(s / 0.5) / jnp.sum(jnp.exp(s / 0.5)))

    def loss(params):
        return weights @ nats_of_rows(params, DATA["user"])[0] / (weights @ n)

    grads, metrics = directed(tau=0.5, score=score)
    common.close(grads, jax.jit(jax.grad(loss))(w), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(metrics["weight/largest"], weights.max())
    np.testing.assert_allclose(metrics["loss/weighted"], loss(w))


def test_weights_closed_form():
    """Scores 0 and ln 3 at temperature 2: odds of sqrt 3. Catches tau as a factor."""
    counts = jnp.array([1.0, 2.0])
    answers = jnp.array([-1.0, -2.0]), counts
    refusals = jnp.array([-1.0, -2.0 - 2 * np.log(3)]), counts
    found = antibody_tuning.row_weights(answers, refusals, 2.0, "mean")
    np.testing.assert_allclose(found.sum(), 1)
    np.testing.assert_allclose(found[1] / found[0], np.sqrt(3))
    found = antibody_tuning.row_weights(answers, refusals, 2.0, "sum")
    np.testing.assert_allclose(found[1] / found[0], 3)


def test_less_than_a_token_is_not_blown_up():
    """The divisor is at least 1. Catches a division by a small weight."""
    user = DATA["user"].replace(weights=DATA["user"].weights * 0.1)
    _, metrics = directed({"user": user, "user_refusal": user})
    total, _ = nats_of_rows(common.params(), user)
    np.testing.assert_allclose(metrics["loss/weighted"], jnp.mean(total))


def test_a_row_without_an_answer_is_finite():
    """Catches 0 / 0 in a mean over no tokens."""
    weights = DATA["user"].weights.copy()
    weights[0] = 0
    user = DATA["user"].replace(weights=weights)
    grads, _ = directed({"user": user, "user_refusal": user}, tau=1.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_options_and_stage():
    """Catches a silent default, and parts of a batch that are weighed apart."""
    assert antibody.FINE_TUNING == "antibody_tuning"
    with pytest.raises(errors.UserError, match="mean"):
        antibody_tuning.streams(antibody_tuning.Hparams(score="means"))
    with pytest.raises(errors.UserError, match="microbatches"):
        antibody_tuning.streams(antibody_tuning.Hparams(microbatches=2))
