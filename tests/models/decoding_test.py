"""Cached decoding equals the full forward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.models import transformer

from .decoder import CONFIG
from .decoder import MODEL
from .decoder import factors
from .decoder import forward
from .decoder import params
from .decoder import tokens


@pytest.mark.parametrize("lora_on", [False, True])
def test_cached_decoding_equals_the_full_forward(lora_on):
    """Catches a cache written at the wrong slot, or positions that start anew."""
    lora = factors(0.3) if lora_on else None
    full = forward(params(), tokens(), lora=lora).logits
    cache = MODEL.init_cache(2, 9)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    decode = jax.jit(MODEL.decode)
    parts = []
    for first, last in ((0, 4), (4, 5), (5, 7)):
        step = slice(first, last)
        logits, cache = decode(
            params(), tokens()[:, step], positions[:, step], cache, lora=lora
        )
        parts.append(logits)
    assert int(cache["end"]) == 7
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5)


def test_the_last_token_alone_is_read_out():
    """Catches the first token's logits, and a head over the whole prompt."""
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    cache = MODEL.init_cache(2, 7)
    decode = jax.jit(MODEL.decode, static_argnames="last")
    whole, _ = decode(params(), tokens(), positions, cache)
    last, after = decode(params(), tokens(), positions, cache, last=True)
    assert last.shape == (2, 1, whole.shape[-1]) and int(after["end"]) == 7
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-6)


def test_cached_decoding_keeps_to_the_sliding_window():
    """Catches a window that only the training forward knows."""
    model = transformer.LanguageModel(dataclasses.replace(CONFIG, sliding_window=3))
    full = forward(params(), tokens(), model=model).logits
    unlimited = forward(params(), tokens()).logits
    assert not np.allclose(full[:, -1], unlimited[:, -1], atol=1e-3)
    cache = model.init_cache(2, 7)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    decode = jax.jit(model.decode)
    _, cache = decode(params(), tokens()[:, :6], positions[:, :6], cache)
    last, _ = decode(params(), tokens()[:, 6:], positions[:, 6:], cache)
    np.testing.assert_allclose(last[:, 0], full[:, -1], atol=1e-5)


def test_interventions_act_in_cached_decoding():
    """Catches a `decode` that drops the hook: steering would not steer."""
    shift = 0.5 * jnp.ones((3, 16))

    def intervene(hidden, where, layer, tap):
        return hidden + tap[None, None] if where == "resid" else hidden

    full = forward(params(), tokens(), intervene=intervene, taps=shift).logits
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    decode = jax.jit(functools.partial(MODEL.decode, intervene=intervene))
    cache = MODEL.init_cache(2, 7)
    logits, _ = decode(params(), tokens(), positions, cache, taps=shift)
    np.testing.assert_allclose(logits, full, atol=1e-5)
