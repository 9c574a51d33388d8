"""Accumulation inside the loss, and the lifts."""

import functools

import jax
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.defenses import vaccine
from ftdefense.methods import lift
from ftdefense.models import toy
from ftdefense.objectives import losses

from ..conftest import batch

MODEL = toy.Toy()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_exact(parts):
    """Catches a mean of means: rows here have unequal numbers of weighted tokens."""
    with jax.enable_x64(True):
        data = batch(0, rows=8)
        weights = data.weights.astype(np.float64)
        weights[:3, 3:] = 0
        data = data.replace(weights=weights)
        params = jax.tree.map(
            lambda x: x.astype(np.float64), MODEL.init(jax.random.key(0))
        )
        whole, part = (
            jax.jit(jax.grad(losses.next_token(MODEL, microbatches=n)))(params, data)
            for n in (1, parts)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
            whole,
            part,
        )


def test_accumulation_keeps_vaccines_one_norm():
    """Catches a shift that is normalised per part, not over the batch."""
    data = {"alignment": batch(0, rows=8)}
    params = MODEL.init(jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(parts, params):
        hp = vaccine.Hparams(microbatches=parts)
        ctx = lift.context(MODEL, types.Lineage(params), hp)
        return vaccine.direction(ctx, params, data, jax.random.key(0))[0]

    whole, part = gradient(1, params), gradient(4, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        whole,
        part,
    )


def test_loss_of_a_uniform_model_is_log_vocabulary():
    """Catches a sum in place of a mean, and weights on the wrong side of the shift."""
    params = jax.tree.map(np.zeros_like, MODEL.init(jax.random.key(0)))
    loss = losses.next_token(MODEL)(params, batch(0))
    np.testing.assert_allclose(loss, np.log(11), rtol=1e-6)
    collapse = losses.next_token(MODEL, losses.toward(3))(params, batch(0))
    np.testing.assert_allclose(collapse, np.log(11), rtol=1e-6)


def test_supervised_is_one_function_per_model_and_role():
    """Catches a new closure per call: every attack would compile again."""
    assert lift.supervised(MODEL, "user") is lift.supervised(toy.Toy(), "user")
