"""The decoder's own promises: hooks, cache, causality, LoRA, numerics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.methods import adapters
from ftdefense.models import generate
from ftdefense.models import transformer

TOKENS = np.random.default_rng(0).integers(1, 29, (3, 9)).astype(np.int32)


def test_later_tokens_change_nothing_before(tiny_llama):
    """Causality, exactly. Catches a mask that is off by one."""
    model, params = tiny_llama
    changed = TOKENS.copy()
    changed[:, 6:] = 1
    first, second = (model(params, t).logits for t in (TOKENS, changed))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.any(first[:, 6:] != second[:, 6:])


@pytest.mark.parametrize("site", ["attn", "mlp", "resid"])
def test_a_shift_reaches_its_layer_and_those_after(tiny_llama, site):
    """Catches a tap that goes to another layer or site."""
    model, params = tiny_llama
    taps = np.zeros((2, *TOKENS.shape, 16), np.float32)
    taps[1] = 0.5

    def shift(hidden, where, layer, tap):
        return hidden + tap if where == site else hidden

    plain = model(params, TOKENS)
    none = model(params, TOKENS, intervene=shift, taps=0 * taps)
    np.testing.assert_array_equal(plain.logits, none.logits)
    moved = model(params, TOKENS, intervene=shift, taps=taps)
    for name in ("attn", "mlp", "resid"):
        np.testing.assert_array_equal(plain.hidden[name][0], moved.hidden[name][0])
    np.testing.assert_allclose(
        moved.hidden[site][1] - plain.hidden[site][1], 0.5, atol=1e-5
    )
    assert np.any(plain.logits != moved.logits)


def test_lora_merged_equals_unmerged(tiny_llama):
    """Catches a scale applied twice, or alpha / rank upside down."""
    model, params = tiny_llama
    lora = adapters.LoRA(alpha=3.0, rank=2)
    factors = lora.init(params, jax.random.key(0))
    bound = lora.bind(model, params)
    np.testing.assert_array_equal(
        bound(factors, TOKENS).logits, model(params, TOKENS).logits
    )
    noise = jax.tree.map(lambda x: x + 0.1, factors)
    merged = lora.merge(noise, params)
    np.testing.assert_allclose(
        bound(noise, TOKENS).logits, model(merged, TOKENS).logits, atol=2e-5
    )
    assert np.any(bound(noise, TOKENS).logits != model(params, TOKENS).logits)


def test_lora_counts_its_parameters(tiny_llama):
    """sum r (d_in + d_out) over the targets. Catches a target left out."""
    _, params = tiny_llama
    factors = adapters.LoRA(rank=2).init(params, jax.random.key(0))
    per_layer = 2 * (16 + 16) * 2 + 2 * (16 + 8) * 2 + 3 * 2 * (16 + 24)
    assert sum(x.size for x in jax.tree.leaves(factors)) == 2 * per_layer


def test_lora_dropout_is_off_without_a_key(tiny_llama):
    """Catches dropout in evaluation, and one mask shared by two keys."""
    model, params = tiny_llama
    lora = adapters.LoRA(rank=2, dropout=0.5)
    factors = jax.tree.map(lambda x: x + 0.1, lora.init(params, jax.random.key(0)))
    bound = lora.bind(model, params)
    still = bound(factors, TOKENS).logits
    first, second = (
        bound(factors, TOKENS, rng=jax.random.key(i)).logits for i in (1, 2)
    )
    np.testing.assert_array_equal(still, bound(factors, TOKENS).logits)
    assert np.any(first != still)
    assert np.any(first != second)


def test_left_padding_changes_no_text(tiny_llama):
    """Catches positions that count the padding, and padding that is attended to."""
    model, params = tiny_llama
    options = {"max_new_tokens": 6, "eos_ids": (99,), "pad_id": 0}
    plain = generate.generate(
        model, params, TOKENS, np.ones(TOKENS.shape, bool), **options
    )
    padded = np.pad(TOKENS, ((0, 0), (4, 0)))
    mask = np.pad(np.ones(TOKENS.shape, bool), ((0, 0), (4, 0)))
    np.testing.assert_array_equal(
        plain, generate.generate(model, params, padded, mask, **options)
    )


def test_cached_text_equals_full_passes(tiny_llama):
    """Catches a cache written one place off."""
    model, params = tiny_llama
    mask = np.ones(TOKENS.shape, bool)
    options = {"max_new_tokens": 5, "eos_ids": (99,), "pad_id": 0}
    cached = generate.generate(model, params, TOKENS, mask, **options)
    row = TOKENS
    for _ in range(5):
        best = jnp.argmax(model(params, row).logits[:, -1], -1)
        row = np.concatenate([row, np.asarray(best, np.int32)[:, None]], 1)
    np.testing.assert_array_equal(cached, row[:, 9:])


def test_text_stops_at_its_end(tiny_llama):
    """Catches a row that goes on after its end token."""
    model, params = tiny_llama
    mask = np.ones(TOKENS.shape, bool)
    free = np.asarray(
        generate.generate(
            model, params, TOKENS, mask, max_new_tokens=5, eos_ids=(99,), pad_id=0
        )
    )
    end = int(free[0, 1])
    ended = np.asarray(
        generate.generate(
            model, params, TOKENS, mask, max_new_tokens=5, eos_ids=(end,), pad_id=0
        )
    )
    stop = int(np.argmax(free[0] == end))
    np.testing.assert_array_equal(ended[0, : stop + 1], free[0, : stop + 1])
    np.testing.assert_array_equal(ended[0, stop + 1 :], 0)


@pytest.mark.parametrize("change", [{"remat": True}, {"unroll": 2}])
def test_memory_options_change_no_gradient(tiny_llama, change):
    """Catches an option that changes what is computed."""
    model, params = tiny_llama
    other = transformer.LanguageModel(dataclasses.replace(model.config, **change))

    def total(m):
        return jax.grad(lambda p: jnp.sum(m(p, TOKENS).logits ** 2))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3),
        total(model),
        total(other),
    )


def test_bfloat16_computes_low_and_answers_high(tiny_llama):
    """Catches logits left in bfloat16, and parameters cast for good."""
    model, params = tiny_llama
    low = transformer.LanguageModel(
        dataclasses.replace(model.config, compute_dtype="bfloat16")
    )
    outputs = low(params, TOKENS)
    assert outputs.logits.dtype == jnp.float32
    assert outputs.hidden["attn"].dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs.logits, model(params, TOKENS).logits, atol=0.3)
