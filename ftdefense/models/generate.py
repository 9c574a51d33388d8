"""Generation: one jitted loop over a key-value cache, left-padded prompts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.models import transformer


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "eos_ids",
        "pad_id",
        "intervene",
        "sample",
    ),
)
def _generate(
    model,
    params,
    tokens_BxP,
    mask_BxP,
    rng,
    temperature,
    top_p,
    taps,
    *,
    max_new_tokens,
    eos_ids,
    pad_id,
    intervene,
    sample,
):
    batch, prompt_length = tokens_BxP.shape
    total = prompt_length + max_new_tokens
    padded_BxM = jnp.pad(mask_BxP, ((0, 0), (0, max_new_tokens)), constant_values=True)
    positions_BxP = jnp.maximum(jnp.cumsum(mask_BxP, axis=1) - 1, 0)
    decode = functools.partial(model.decode, params, intervene=intervene, taps=taps)

    def choose(logits_BxV, rng):
        if not sample:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        scaled = logits_BxV / temperature
        return jax.random.categorical(rng, nucleus(scaled, top_p)).astype(jnp.int32)

    def ended(token_B):
        return jnp.isin(token_B, jnp.asarray(eos_ids, jnp.int32))

    causal_PxM = jnp.arange(total)[None, :] <= jnp.arange(prompt_length)[:, None]
    logits, cache = decode(
        tokens_BxP,
        positions_BxP,
        causal_PxM[None] & padded_BxM[:, None, :],
        model.init_cache(batch, total),
        jnp.int32(0),
    )
    first_B = choose(logits[:, -1], jax.random.fold_in(rng, 0))
    out_BxT = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    out_BxT = out_BxT.at[:, 0].set(first_B)
    carry = (jnp.int32(1), first_B, ended(first_B), out_BxT, cache)

    def running(carry):
        t, _, done_B, _, _ = carry
        return (t < max_new_tokens) & ~jnp.all(done_B)

    def body(carry):
        t, token_B, done_B, out_BxT, cache = carry
        index = prompt_length + t - 1
        visible_BxM = padded_BxM & (jnp.arange(total) <= index)[None]
        logits, cache = decode(
            token_B[:, None],
            (positions_BxP[:, -1] + t)[:, None],
            visible_BxM[:, None, :],
            cache,
            index,
        )
        token_B = choose(logits[:, 0], jax.random.fold_in(rng, t))
        token_B = jnp.where(done_B, pad_id, token_B)
        out_BxT = out_BxT.at[:, t].set(token_B)
        return t + 1, token_B, done_B | ended(token_B), out_BxT, cache

    return jax.lax.while_loop(running, body, carry)[3]


def nucleus(logits_BxV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Keeps the most likely tokens whose mass before them is below `top_p`."""
    order = jnp.argsort(-logits_BxV, axis=-1)
    ranked = jnp.take_along_axis(logits_BxV, order, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    cut = jnp.where(before < top_p, ranked, -jnp.inf)
    return jnp.take_along_axis(cut, jnp.argsort(order, axis=-1), axis=-1)


def generate(
    model: transformer.LanguageModel,
    params: types.Params,
    tokens_BxP: jax.Array,
    mask_BxP: jax.Array,
    rng: types.Rng | None = None,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    intervene: types.Intervention | None = None,
    taps: Any = None,
) -> jax.Array:
    """Continuations int32 [B, max_new_tokens]; `pad_id` after the first end token.

    Args:
      tokens_BxP: prompts, padded on the left.
      mask_BxP: True on real tokens.
      rng: key for sampling; unused when greedy.
      temperature: 0 for greedy.
      top_p: mass of the nucleus that is sampled from.
      eos_ids: ids that end a row; the end token itself is kept.
      intervene, taps: an inference-time intervention (see `core.types.Release`).
    """
    return _generate(
        model,
        params,
        jnp.asarray(tokens_BxP),
        jnp.asarray(mask_BxP, bool),
        jax.random.key(0) if rng is None else rng,
        jnp.float32(temperature),
        jnp.float32(top_p),
        taps,
        max_new_tokens=max_new_tokens,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
        intervene=intervene,
        sample=temperature > 0,
    )
