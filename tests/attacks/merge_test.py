"""Merges with a twin, and with what was public: identities and slow references."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import merge
from ftdefense.attacks import revert
from ftdefense.core import errors
from ftdefense.methods import adapters
from ftdefense.methods import merging

from .lineages import close
from .lineages import edited
from .lineages import lineage
from .lineages import same


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("mode", [m for m in merge.MODES if m != "ties"])
def test_weight_zero_is_the_release(mode):
    """B.13. Catches a merge that starts from the twin, or from the base."""
    found = edited(merge, merge.Hparams(lam=0.0, mode=mode))
    (close if mode == "slerp" else same)(found, lineage().current)


@pytest.mark.parametrize("mode", ["arithmetic", "linear", "slerp", "dare"])
def test_weight_one_on_the_base_is_the_twin(mode):
    """B.13. Catches h - d for h - b, a halved weight, DARE without its rescaling."""
    origin = lineage()
    origin = origin.replace(current=origin.aligned)
    hp = merge.Hparams(lam=1.0, density=1.0, mode=mode)
    close(edited(merge, hp, origin), origin.twin)


def test_arithmetic_on_a_lora_twin_merges_its_adapter():
    """B.21: d + (alpha / rank) A B. Catches the adapter's scale taken twice."""
    origin, adapter = lineage(), adapters.LoRA(alpha=6.0, rank=2, targets=("up",))
    factors = adapter.init(origin.aligned, jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    origin = origin.replace(twin=adapter.merge(factors, origin.aligned))
    found = edited(merge, merge.Hparams(), origin)
    close(found, adapter.merge(factors, origin.current), 1e-7)
    up = found["layers"]["mix"]["up"]["kernel"]
    low = factors["layers"]["mix"]["up"]
    wanted = origin.current["layers"]["mix"]["up"]["kernel"] + 3 * low["a"] @ low["b"]
    np.testing.assert_allclose(up, wanted, atol=1e-6)
    size = sum(x.size for x in jax.tree.leaves(factors))
    assert size == 2 * (2 * (8 + 8))  # Layers, then rank times (in + out): B.6.


def test_slerp_keeps_the_length_of_an_arc():
    """Catches the line for the arc, and one angle for all layers of a stack."""
    x = {"layers": jnp.array([[1.0, 0.0], [1.0, 0.0]]), "head": jnp.array([2.0, 0.0])}
    y = {"layers": jnp.array([[0.0, 1.0], [1.0, 0.0]]), "head": jnp.array([0.0, 2.0])}
    found = merging.slerp(x, 1 / 3, y)
    third = np.array([np.cos(np.pi / 6), 0.5])
    np.testing.assert_allclose(found["layers"], [third, [1, 0]], atol=1e-12)
    np.testing.assert_allclose(found["head"], 2 * third, atol=1e-12)


@pytest.mark.parametrize("moved", [0, 1])
def test_transplant_moves_a_range_of_layers(moved):
    """Catches a bound that is ignored, and an embedding of the twin."""
    origin = lineage()
    hp = merge.Hparams(mode="transplant", first=moved / 2, last=(moved + 1) / 2)
    found = edited(merge, hp, origin)
    for name in ("up", "down"):
        got, release, twin = (
            p["layers"]["mix"][name]["kernel"]
            for p in (found, origin.current, origin.twin)
        )
        np.testing.assert_array_equal(got[1 - moved], release[1 - moved])
        np.testing.assert_allclose(got[moved], twin[moved], atol=1e-12)
    same(found["embed"], origin.current["embed"])


def test_ties_equals_a_loop():
    """Catches an unscaled mean over both, a sign elected before the trimming."""
    rng = np.random.default_rng(0)
    o, x, y = rng.standard_normal((3, 4, 5))
    found = merging.ties({"w": o}, 0.7, {"w": x}, {"w": y}, 0.5)["w"]
    moves = []
    for end in (x, y):
        move = end - o
        least = np.sort(np.abs(move).ravel())[10]
        moves.append(np.where(np.abs(move) >= least, move, 0))
    wanted = o.copy()
    for i, j in itertools.product(range(4), range(5)):
        pair = [m[i, j] for m in moves if m[i, j] != 0]
        sign = np.sign(sum(pair))
        pair = [v for v in pair if np.sign(v) == sign]
        if pair:
            wanted[i, j] += 0.7 * sum(pair) / len(pair)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_dare_drops_and_rescales():
    """Catches density for its complement, and one mask for all tensors."""
    zeros = {"a": jnp.zeros(4000), "b": jnp.zeros(4000)}
    ones = {"a": jnp.ones(4000), "b": jnp.ones(4000)}
    found = merging.dare(zeros, 1.0, ones, zeros, 0.25, jax.random.key(0))
    for leaf in found.values():
        np.testing.assert_allclose(np.unique(leaf), [0, 4])
        np.testing.assert_allclose(np.mean(leaf), 1, atol=0.1)
    assert np.any(found["a"] != found["b"])


def test_revert_subtracts_the_alignment():
    """Catches a - p for p - a, and an interpolation away from its end."""
    origin = lineage()
    same(edited(revert, revert.Hparams(lam=0.0), origin), origin.current)
    on_aligned = origin.replace(current=origin.aligned)
    close(edited(revert, revert.Hparams(), on_aligned), origin.pretrained)
    for toward in revert.ENDS:
        hp = revert.Hparams(lam=0.25, mode="linear", toward=toward)
        wanted = jax.tree.map(
            lambda d, e: 0.75 * d + 0.25 * e, origin.current, getattr(origin, toward)
        )
        close(edited(revert, hp, origin), wanted)


def test_missing_weights_and_bad_names_are_named():
    """Catches a TypeError about None, and a mode that silently does nothing."""
    origin = lineage()
    with pytest.raises(errors.UserError, match="same fine-tuning"):
        edited(merge, merge.Hparams(), origin.replace(twin=None))
    with pytest.raises(errors.UserError, match="before alignment"):
        edited(revert, revert.Hparams(), origin.replace(pretrained=None))
    with pytest.raises(errors.UserError, match="did you mean 'slerp'"):
        edited(merge, merge.Hparams(mode="slrp"))
    with pytest.raises(errors.UserError, match="revert toward"):
        edited(revert, revert.Hparams(mode="linear", toward="alined"))
