"""Quantisation and noise (specs/attacks.md B.13): golden values and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import quantise
from ftdefense.attacks import weight_noise
from ftdefense.core import errors
from ftdefense.methods import rounding

from .lineages import close
from .lineages import edited
from .lineages import lineage
from .lineages import same
from .lineages import weights

# As published for NF4, to four decimals.
NF4 = (
    "-1.0000 -0.6962 -0.5251 -0.3949 -0.2844 -0.1848 -0.0911 0.0000 "
    "0.0796 0.1609 0.2461 0.3379 0.4407 0.5626 0.7230 1.0000"
)


rounded = jax.jit(rounding.rounded, static_argnums=(1, 2))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_int4_has_the_published_codes():
    """Catches 8 levels for 7, and truncation for rounding."""
    x = jnp.array([-0.7, 0.33, 0.12, 0.0])
    found, scale = rounding.codes(x, "int4")
    np.testing.assert_array_equal(found, [-7, 3, 1, 0])
    np.testing.assert_allclose(scale, 0.1, rtol=1e-12)
    assert np.abs(found * scale - x).max() <= scale[0] / 2
    np.testing.assert_array_equal(rounding.codes(0 * x, "int4")[0], 0)


def test_nf4_has_the_published_values():
    """Catches sixteen even steps, and another offset."""
    wanted = np.array(NF4.split(), float)
    np.testing.assert_allclose(rounding.normal_float(), wanted, atol=6e-5)
    x = jnp.array([-2.0, 0.3, 1.01])
    found, scale = rounding.codes(x, "nf4")
    nearest = wanted[np.abs(wanted[None] - np.asarray(x / 2)[:, None]).argmin(1)]
    np.testing.assert_allclose(found, nearest, atol=6e-5)
    assert scale[0] == 2


@pytest.mark.parametrize("kind", rounding.FORMATS)
@pytest.mark.parametrize("group", [0, 4])
def test_errors_are_of_half_a_bin_and_twice_is_once(kind, group):
    """Catches a scale per input channel, and groups that are not undone."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 3)))
    once = rounded(kernel, kind, group)
    parts = np.abs(kernel).reshape(2, -1, group or 8, 3).max(2, keepdims=True)
    most = np.broadcast_to(parts, (2, 8 // (group or 8), group or 8, 3))
    widest = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.31}[kind]
    assert np.all(np.abs(once - kernel) <= most.reshape(2, 8, 3) * widest / 2 + 1e-12)
    np.testing.assert_allclose(rounded(once, kind, group), once, atol=1e-12)
    assert np.abs(once - kernel).max() > 1e-4


def test_fewer_bits_are_further_away():
    """Catches one format for all, and an edit of what stays in full precision."""
    base = lineage().current
    distance = {}
    for kind in rounding.FORMATS:
        found = edited(quantise, quantise.Hparams(kind))
        same(found["embed"], base["embed"])
        same(found["lm_head"], base["lm_head"])
        old, new = (p["layers"]["mix"]["up"]["kernel"] for p in (base, found))
        distance[kind] = float(jnp.linalg.norm(new - old))
    assert distance["int8"] < 0.2 * min(distance["nf4"], distance["int4"])
    assert distance["nf4"] != distance["int4"]
    head = edited(quantise, quantise.Hparams(head=True))["lm_head"]["kernel"]
    assert np.any(head != base["lm_head"]["kernel"])


def test_bad_settings_are_named():
    """Catches a reshape's message, and a KeyError."""
    with pytest.raises(errors.UserError, match="group=3 does not divide"):
        edited(quantise, quantise.Hparams(group=3))
    with pytest.raises(errors.UserError, match="did you mean"):
        edited(quantise, quantise.Hparams("int44"))


def test_small_updates_are_lost_in_bfloat16():
    """B.13's precision check: why attacks keep float32 master weights."""
    assert jnp.bfloat16(1 + 1e-3) == 1


def test_noise_is_relative_to_each_layer():
    """Catches a norm over the stack, the norm without 1 / sqrt(numel), one key."""
    params = {"layers": {"w": {"kernel": jnp.ones((2, 50, 60))}}, "scale": jnp.ones(9)}
    params["layers"]["w"]["kernel"] *= jnp.array([1.0, 10.0])[:, None, None]
    params["head"] = jnp.full((50, 60), 3.0)
    found = weight_noise.noisy(params, 0.05, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), found, params)
    kernel = moved["layers"]["w"]["kernel"]
    np.testing.assert_allclose(kernel.std((1, 2)), [0.05, 0.5], rtol=0.05)
    np.testing.assert_allclose(moved["head"].std(), 0.15, rtol=0.05)
    assert np.abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.1
    assert np.abs(np.corrcoef(kernel[0].ravel(), moved["head"].ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(moved["scale"], 0)


def test_no_noise_is_the_release():
    """Catches noise that sigma does not scale, or that the seed does not choose."""
    base = lineage().current
    same(edited(weight_noise, weight_noise.Hparams(sigma=0.0)), base)
    one, other = (edited(weight_noise, weight_noise.Hparams(), seed=s) for s in (0, 1))
    assert np.any(one["lm_head"]["kernel"] != other["lm_head"]["kernel"])
    close(
        one, base, 0.02 * 6 * float(jnp.max(jnp.abs(weights(0)["lm_head"]["kernel"])))
    )
