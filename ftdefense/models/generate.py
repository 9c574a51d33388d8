"""Generation: one jitted loop over a key-value cache, prompts padded on the left."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import types
from ftdefense.models import transformer


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
    temperature: float | jax.Array = 0.0,
    top_p: float | jax.Array = 1.0,
    lora: types.Params | None = None,
    intervene: types.Intervention | None = None,
    taps: Any = None,
) -> jax.Array:
    """Continuations int32 [B, max_new_tokens]; `pad_id` after the first end token.

    Compiles once for each model, shape and `intervene` (by identity); temperature and
    top_p are traced. The loop stops when every row has ended.

    Args:
      model: what to decode with.
      params: its parameters.
      tokens_BxP: int32 prompts, padded on the left.
      mask_BxP: True on real tokens.
      rng: typed key for sampling; greedy decoding needs none.
      max_new_tokens: at least 1.
      eos_ids: ids that end a row; the end token itself is kept.
      pad_id: fills a row after its end.
      temperature: divides the logits; 0 for greedy.
      top_p: in (0, 1]; samples from the fewest likeliest tokens of at least this mass.
      lora: low-rank factors, as for the model.
      intervene: an inference-time intervention (see `core.types.Release`).
      taps: its pytree with leading axis N.

    Raises:
      ValueError: for an empty budget, prompts padded on the right, or sampling without
        a key.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if isinstance(mask_BxP, np.ndarray) and np.any(mask_BxP[:, :-1] > mask_BxP[:, 1:]):
        raise ValueError("prompts must be padded on the left: a mask ends in padding.")
    if rng is None:
        if not isinstance(temperature, (int, float)) or temperature > 0:
            raise ValueError("sampling (temperature > 0) needs a key: pass rng.")
        rng = jax.random.key(0)
    return _generate(
        model,
        params,
        jnp.asarray(tokens_BxP, jnp.int32),
        jnp.asarray(mask_BxP, bool),
        rng,
        jnp.float32(temperature),
        jnp.float32(top_p),
        lora,
        taps,
        max_new_tokens=max_new_tokens,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
        intervene=intervene,
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "eos_ids", "pad_id", "intervene"),
)
def _generate(
    model,
    params,
    tokens_BxP,
    mask_BxP,
    rng,
    temperature,
    top_p,
    lora,
    taps,
    *,
    max_new_tokens,
    eos_ids,
    pad_id,
    intervene,
):
    batch, prompt_length = tokens_BxP.shape
    decode = functools.partial(
        model.decode, params, lora=lora, intervene=intervene, taps=taps
    )

    def choose(logits_BxV, t, done_B):
        rng_t = jax.random.fold_in(rng, t)
        token_B = choose_tokens(logits_BxV, rng_t, temperature, top_p)
        token_B = jnp.where(done_B, pad_id, token_B)
        return token_B, done_B | jnp.isin(token_B, jnp.asarray(eos_ids, jnp.int32))

    # Positions count real tokens; -1 hides padding from everything.
    positions_BxP = jnp.where(mask_BxP, jnp.cumsum(mask_BxP, axis=1) - 1, -1)
    cache = model.init_cache(batch, prompt_length + max_new_tokens - 1)
    logits_Bx1xV, cache = decode(tokens_BxP, positions_BxP, cache, last=True)
    token_B, done_B = choose(logits_Bx1xV[:, 0], 0, jnp.zeros(batch, bool))
    said_BxT = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    said_BxT = said_BxT.at[:, 0].set(token_B)

    def running(carry):
        t, _, done_B, _, _ = carry
        return (t < max_new_tokens) & ~jnp.all(done_B)

    def advance(carry):
        t, token_B, done_B, said_BxT, cache = carry
        positions_B = positions_BxP[:, -1] + t
        logits_Bx1xV, cache = decode(token_B[:, None], positions_B[:, None], cache)
        token_B, done_B = choose(logits_Bx1xV[:, 0], t, done_B)
        return t + 1, token_B, done_B, said_BxT.at[:, t].set(token_B), cache

    carry = (jnp.int32(1), token_B, done_B, said_BxT, cache)
    return jax.lax.while_loop(running, advance, carry)[3]


def choose_tokens(
    logits_BxV: jax.Array, rng: types.Rng, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """One token a row, int32 [B]: the likeliest at temperature 0, else a sample."""

    def greedy(logits_BxV):
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)

    def sample(logits_BxV):
        scaled_BxV = logits_BxV / temperature
        kept_BxV = jax.lax.cond(
            top_p < 1, lambda x: nucleus(x, top_p), lambda x: x, scaled_BxV
        )
        return jax.random.categorical(rng, kept_BxV).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sample, greedy, logits_BxV)


def nucleus(logits_BxV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Logits with -inf at all but the likeliest tokens that reach mass `top_p`.

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    order_BxV = jnp.argsort(-logits_BxV, axis=-1)
    ranked_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1)
    mass_BxV = jax.nn.softmax(ranked_BxV, axis=-1)
    before_BxV = jnp.cumsum(mass_BxV, axis=-1) - mass_BxV
    # The likeliest token stays, whatever top_p is.
    kept_BxV = (before_BxV < top_p).at[:, 0].set(True)
    cut_BxV = jnp.where(kept_BxV, ranked_BxV, -jnp.inf)
    return jnp.take_along_axis(cut_BxV, jnp.argsort(order_BxV, axis=-1), axis=-1)
