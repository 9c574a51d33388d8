"""Uphill first, and downhill from there."""

import jax
import numpy as np

from ftdefense.attacks import sft
from ftdefense.attacks import sign_flip
from ftdefense.methods import optimizers

from ..conftest import batch
from . import attacks_test as shared

SGD = optimizers.Optimizer(0.1, clip=float("inf"), kind="sgd")


def test_without_ascent_it_is_sft():
    """To the bit. Catches a first step that always climbs."""
    rows = {"user": shared.stacked(0)}
    plain, _ = shared.attacked("sft", sft.Hparams(SGD), rows)
    same, _ = shared.attacked("sign_flip", sign_flip.Hparams(SGD, ascent=0.0), rows)
    jax.tree.map(np.testing.assert_array_equal, plain, same)


def test_ascent_is_descent_backwards():
    """All steps uphill are SFT at the negative rate. Catches a loss that is halved."""
    rows = {"user": shared.stacked(0)}
    up, _ = shared.attacked("sign_flip", sign_flip.Hparams(SGD, ascent=1.0), rows)
    back, _ = shared.attacked("sft", sft.Hparams(SGD.replace(learning_rate=-0.1)), rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), up, back)


def test_climbs_for_its_share_and_then_descends():
    """Catches a flip one step late, and a run that ends uphill."""
    same = jax.tree.map(lambda x: np.stack([x] * 50), batch(0))
    hp = sign_flip.Hparams(optimizers.Optimizer(3e-2), ascent=0.06)
    _, metrics = shared.attacked("sign_flip", hp, {"user": same}, 50)
    loss = metrics["loss/user"]
    np.testing.assert_array_equal(metrics["state/ascent"], [1.0] * 3 + [0.0] * 47)
    assert np.all(np.diff(loss[:4]) > 0)
    assert loss[-1] < 0.8 * loss[0]
