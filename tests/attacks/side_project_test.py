"""What is dropped of the harmful gradient, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import sft
from ftdefense.attacks import side_project
from ftdefense.core import tree
from ftdefense.methods import optimizers

from ..conftest import batch
from . import attacks_test as shared


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_projection(sign):
    """Catches a sign, a norm for its square, and a projection of what agrees."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        against = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
        noise = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
        grads = tree.add_scale(noise, 2 * sign, against)
        found = side_project.project(grads, against)
        if sign > 0:
            jax.tree.map(np.testing.assert_array_equal, found, grads)
        else:
            assert tree.dot(grads, against) < 0
            np.testing.assert_allclose(tree.dot(found, against), 0, atol=1e-12)
            # What is left differs along the benign gradient alone.
            lost = jax.tree.map(jnp.subtract, grads, found)
            np.testing.assert_allclose(tree.cosine(lost, against), -1, rtol=1e-12)


def test_a_vanishing_benign_gradient_changes_nothing():
    """Catches 0 / 0."""
    grads, zero = {"a": jnp.ones(3)}, {"a": jnp.zeros(3)}
    found = side_project.project(grads, zero)
    np.testing.assert_array_equal(found["a"], grads["a"])


def test_without_its_part_it_is_sft():
    """To the bit. Catches a projection that `part` does not scale."""
    harmful, benign = shared.stacked(0), shared.stacked(50)
    optimizer = optimizers.Optimizer(1e-2)
    plain, _ = shared.attacked("sft", sft.Hparams(optimizer), {"user": harmful})
    hp = side_project.Hparams(optimizer, part=0.0)
    rows = {"harmful": harmful, "benign": benign}
    same, _ = shared.attacked("side_project", hp, rows)
    jax.tree.map(np.testing.assert_array_equal, plain, same)


def test_lowers_the_harmful_loss_and_spares_the_benign_one():
    """Beside SFT from the same start. Catches an ascent, and roles exchanged."""
    harmful, benign = (
        jax.tree.map(lambda x: np.stack([x] * 12), batch(i)) for i in range(2)
    )
    rows, rate = {"harmful": harmful, "benign": benign}, optimizers.Optimizer(3e-2)
    ends = {}
    for part in (0.0, 1.0):
        hp = side_project.Hparams(rate, part=part)
        _, metrics = shared.attacked("side_project", hp, rows, 12)
        ends[part] = metrics
    assert ends[1.0]["loss/harmful"][-1] < 0.8 * ends[1.0]["loss/harmful"][0]
    assert ends[1.0]["loss/benign"][-1] < ends[0.0]["loss/benign"][-1]
