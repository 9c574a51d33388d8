"""How far the first step goes, and that what follows is SFT."""

import dataclasses

import jax
import numpy as np
import pytest

from ftdefense.attacks import noise_start
from ftdefense.attacks import sft
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import optimizers
from ftdefense.training import loop

from ..conftest import batch
from . import attacks_test as shared

LORA = adapters.LoRA(rank=2, alpha=3.0, targets=("up", "down"))
ADAPTERS = [adapters.Full(), LORA]


def started(hp, seed=1):
    """Weights before the first step, and those of the release."""
    method = registry.method("attacks", "noise_start", shared.MODEL)
    lineage = types.Lineage(shared.MODEL.init(jax.random.key(0)))
    state = loop.init(method, lineage, hp, jax.random.key(seed), 1)
    return method.release(state, lineage).params, lineage.current


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_noise_has_its_length_layer_by_layer(adapter):
    """Catches one norm over a stack, a length relative to sqrt(size), and noise that

    LoRA's scale alpha / rank = 1.5 multiplies.
    """
    hp = noise_start.Hparams(adapter=adapter, noise=0.03)
    moved, base = started(hp)
    both = zip(jax.tree.leaves(moved), jax.tree.leaves(base), strict=True)
    stacked = 0
    for after, before in both:
        if before.ndim == 2 and adapter is LORA:
            np.testing.assert_array_equal(after, before)
            continue
        parts = (
            [(after, before)] if before.ndim == 2 else zip(after, before, strict=True)
        )
        for a, b in parts:
            length = np.linalg.norm(a - b) / np.linalg.norm(b)
            np.testing.assert_allclose(length, 0.03, rtol=1e-4)
            stacked += before.ndim == 3
    assert stacked == 4


def test_seeds_go_different_ways():
    """Catches a constant key."""
    ways = [
        jax.tree.leaves(started(noise_start.Hparams(noise=0.1), seed)[0])[0]
        for seed in (1, 2)
    ]
    assert not np.allclose(*ways)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_without_noise_it_is_sft(adapter):
    """To the bit. Catches another key of the adapter, and noise that is added anyway."""
    rows, optimizer = {"user": shared.stacked(0)}, optimizers.Optimizer(1e-2)
    plain, _ = shared.attacked("sft", sft.Hparams(optimizer, adapter), rows)
    hp = noise_start.Hparams(optimizer, adapter, noise=0.0)
    same, _ = shared.attacked("noise_start", hp, rows)
    jax.tree.map(np.testing.assert_array_equal, plain, same)


def test_averages_start_at_the_noise():
    """Catches an optimizer that was made for the weights before the noise."""
    hp = noise_start.Hparams(optimizers.of_kind("adamw_sf", 0.1), noise=0.1)
    plain = dataclasses.replace(hp, optimizer=optimizers.Optimizer())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        started(hp)[0],
        started(plain)[0],
    )


def test_lowers_its_loss():
    """Catches a start that is drawn anew in every step."""
    same = jax.tree.map(lambda x: np.stack([x] * 12), batch(0))
    hp = noise_start.Hparams(optimizers.Optimizer(3e-2), noise=0.1)
    _, metrics = shared.attacked("noise_start", hp, {"user": same}, 12)
    assert metrics["loss/user"][-1] < 0.8 * metrics["loss/user"][0]
