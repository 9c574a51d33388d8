"""Latent attacks (specs/attacks.md B.14): projections, nulls, and what decoding sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit import latent_pgd
from ftdefense.core import errors
from ftdefense.data import pools
from ftdefense.data import sandbox
from ftdefense.models import generate
from ftdefense.models import transformer

Settings = latent_pgd.Settings


@pytest.fixture(autouse=True)
def float64():
    """Not here: generation and the decoder are in float32."""


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


@pytest.fixture(scope="module")
def decoder(world):
    model = transformer.LanguageModel(
        transformer.ModelConfig(len(world.tokenizer), 16, 2, 2, 1, 16, max_length=32)
    )
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def asked(world):
    """Prompts of unequal lengths, and one opening each."""
    examples = [*world.evaluation["harmful"][:3], world.evaluation["benign"][-1]]
    prompts = pools.encode_prompts(world.tokenizer, examples, pad_id=world.pad_id)
    assert not prompts.mask.all()
    return examples, prompts, ["surely", "so kim", "well", "surely"]


def attacked(decoder, world, asked, **fields):
    target = latent_pgd.targets(world, asked[2])
    return latent_pgd.attack(*decoder, asked[1], *target, Settings(**fields))


def test_projections_have_the_published_values():
    """(3, 4) -> (.6, .8). Catches one norm over all positions, and a clip for a ball."""
    x = jnp.array([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])
    found = latent_pgd.project(x, jnp.float32(1), "l2")
    np.testing.assert_allclose(found, [[[0.6, 0.8], [0.3, 0.4], [0, 0]]], rtol=1e-6)
    found = latent_pgd.project(-x, jnp.float32(0.35), "linf")
    np.testing.assert_allclose(found, [[[-0.35, -0.35], [-0.3, -0.35], [0, 0]]])


@pytest.mark.parametrize("norm", latent_pgd.NORMS)
def test_the_loss_falls_within_the_radius(norm, decoder, world, asked):
    """Catches ascent, a radius over the prompt, shifts of padding or other layers."""
    release, values = attacked(decoder, world, asked, radius=0.8, norm=norm)
    assert values.shape == (17,) and values[-1] < values[0] - 0.5
    taps = np.asarray(release.taps)
    size = np.abs(taps) if norm == "linf" else np.linalg.norm(taps, axis=-1)
    assert 0.7 < size.max() <= 0.8 + 1e-5
    assert not taps[1].any() and taps[0].any()
    assert not taps[0][~asked[1].mask].any()
    more = attacked(decoder, world, asked, radius=0.8, norm=norm, layers=(0, 1))[1]
    assert more[-1] < values[-1] and np.isclose(more[0], values[0])


def test_what_is_descended_is_what_decoding_sees(decoder, world, asked):
    """Catches positions of the padding, a tap lost at prefill, shifted targets."""
    release, values = attacked(decoder, world, asked, radius=0.8)
    model, params = decoder
    _, prompts, openings = asked
    ids, weights = latent_pgd.targets(world, openings)
    width, total = prompts.tokens.shape[1], 0.0
    decode = jax.jit(functools.partial(model.decode, intervene=release.intervene))
    for i, row in enumerate(ids):
        mask = prompts.mask[i : i + 1]
        positions = np.where(mask, mask.cumsum(1) - 1, -1)
        cache = model.init_cache(1, width + len(row))
        tokens = prompts.tokens[i : i + 1]
        taps = {"taps": release.taps[:, i : i + 1]}
        logits, cache = decode(params, tokens, positions, cache, **taps)
        for t, token in enumerate(row[weights[i] > 0]):
            total -= jax.nn.log_softmax(logits[0, -1])[token]
            at = positions[:, -1:] + 1 + t
            one = np.full((1, 1), token, np.int32)
            logits, cache = decode(params, one, at, cache, **taps)
    np.testing.assert_allclose(total / weights.sum(), values[-1], rtol=1e-4)


@pytest.mark.parametrize("norm", latent_pgd.NORMS)
def test_radius_zero_is_the_release(norm, decoder, world, asked):
    """Catches a step taken after the projection, and 0 / 0 at a zero shift."""
    examples, prompts, openings = asked
    settings = Settings(radius=0.0, rate=0.1, steps=2, norm=norm)
    said = latent_pgd.answers(
        *decoder, world, examples, openings, settings, batch_size=3
    )
    plain = generate.generate(
        *decoder,
        prompts.tokens,
        prompts.mask,
        max_new_tokens=world.max_new_tokens,
        eos_ids=world.eos_ids,
        pad_id=world.pad_id,
    )
    assert said == world.tokenizer.batch_decode(
        np.asarray(plain), skip_special_tokens=True
    )


def test_answers_open_as_the_attacker_wants(decoder, world, asked):
    """Catches taps of another batch's rows: with a wide radius any model obeys."""
    examples, _, openings = asked
    settings = Settings(radius=30.0, steps=32, layers=(0, 1))
    said = latent_pgd.answers(
        *decoder, world, examples, openings, settings, batch_size=3
    )
    first = [text.split()[:1] for text in said]
    assert first == [opening.split()[:1] for opening in openings]


def test_bad_settings_are_named(decoder, world, asked):
    """Catches a norm that silently is the other, and a layer that is clipped."""
    with pytest.raises(errors.UserError, match="did you mean 'linf'"):
        attacked(decoder, world, asked, norm="lin")
    with pytest.raises(errors.UserError, match="the model has 2"):
        attacked(decoder, world, asked, layers=(2,))
    with pytest.raises(errors.UserError, match="opening is empty"):
        latent_pgd.targets(world, ["surely", ""])
