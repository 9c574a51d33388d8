"""A Llama-style decoder: pure functions of plain nested parameters, with hooks.

One Linen module serves training (`LanguageModel.__call__`) and cached decoding
(`LanguageModel.decode`). Layers are stacked along a leading axis N and scanned.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.models import configuration
from ftdefense.models import layers
from ftdefense.models import rope

ModelConfig = configuration.ModelConfig
Cache = layers.Cache


class Embedding(nn.Module):
    """Returns the token table [V, D] itself: a tied head reads it again."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        config = self.config
        initializer = nn.initializers.normal(config.init_scale or config.width**-0.5)
        return self.param("embedding", initializer, (config.vocab_size, config.width))


class Decoder(nn.Module):
    """(tokens, positions) -> (Outputs, cache)."""

    config: ModelConfig
    intervene: types.Intervention | None = None
    last: bool = False  # Reads out the last token alone: logits [B, 1, V].

    @nn.compact
    def __call__(
        self,
        tokens_BxL: jax.Array,
        positions_BxL: jax.Array,
        taps: Any,
        dropout: Any,
        cache: Cache | None = None,
        attended_BxL: jax.Array | None = None,
    ) -> tuple[types.Outputs, Cache | None]:
        config = self.config
        edit = layers.editor(self.intervene)
        table_VxD = Embedding(config, name="embed")()
        embed_BxLxD = table_VxD[tokens_BxL].astype(config.compute_dtype)
        embed_BxLxD = edit(embed_BxLxD, "embed", jnp.int32(0), None)
        turn = rope.turns(
            positions_BxL,
            rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling),
        )
        mask_BxLxS = None if attended_BxL is None else attended_BxL[:, None] > 0
        if cache is not None:
            cache, mask_BxLxS = _reserve(cache, positions_BxL, config.sliding_window)
        (x_BxLxD, cache), hidden = self._stack()(
            (embed_BxLxD, cache),
            jnp.arange(config.layers, dtype=jnp.int32),
            taps,
            turn,
            mask_BxLxS,
            dropout,
        )
        if cache is not None:
            cache = {**cache, "end": cache["end"] + tokens_BxL.shape[1]}
        x_BxLxD = x_BxLxD[:, -1:] if self.last else x_BxLxD
        x_BxLxD, logits_BxLxV = _head(config, x_BxLxD, table_VxD, dropout)
        hidden = {"embed": embed_BxLxD, **hidden, "final": x_BxLxD}
        return types.Outputs(logits_BxLxV, hidden), cache

    def _stack(self) -> nn.Module:
        """All blocks as one module whose variables have a leading axis N."""
        config = self.config
        unroll = config.scan_unroll
        block = layers.Block
        if config.remat:
            # In a loop nothing can merge the recomputation with the forward pass;
            # unrolled, the compiler must be kept from it.
            block = nn.remat(block, prevent_cse=unroll > 1)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.layers,
            unroll=unroll,
        )
        return stack(config, self.intervene, name="layers")


class Readout(nn.Module):
    """The end of `Decoder` alone, under the same names: hidden states -> logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array) -> jax.Array:
        tied = self.config.tied
        table_VxD = Embedding(self.config, name="embed")() if tied else None
        return _head(self.config, hidden_BxLxD, table_VxD, 0.0)[1]


def _head(
    config: ModelConfig, x_BxLxD: jax.Array, table_VxD: jax.Array | None, dropout: Any
) -> tuple[jax.Array, jax.Array]:
    """(normed hidden states, logits), as submodules of the module that calls."""
    x_BxLxD = layers.RMSNorm(config.norm_epsilon, name="final_norm")(x_BxLxD)
    if config.tied:
        return x_BxLxD, layers.dot(x_BxLxD, table_VxD.T, jnp.float32)
    head = layers.Projection(
        config.vocab_size, config.init_scale, out_dtype=jnp.float32, name="lm_head"
    )
    return x_BxLxD, head(x_BxLxD, dropout)


def _reserve(
    cache: Cache, positions_BxL: jax.Array, window: int | None
) -> tuple[Cache, jax.Array]:
    """Notes the new positions, and tells which slots each of them sees [B, L, S]."""
    positions_BxS = jax.lax.dynamic_update_slice(
        cache["positions"], positions_BxL.astype(jnp.int32), (0, cache["end"])
    )
    query_BxLx1, key_Bx1xS = positions_BxL[:, :, None], positions_BxS[:, None]
    mask_BxLxS = (key_Bx1xS >= 0) & (key_Bx1xS <= query_BxLx1)
    if window is not None:
        mask_BxLxS &= key_Bx1xS > query_BxLx1 - window
    return {**cache, "positions": positions_BxS}, mask_BxLxS


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder as a `core.types.Model`; equal, and equally hashed, by its config.

    Parameters are nested dicts of float32 arrays, layers stacked along axis N:
    embed/embedding [V, D]; layers/{attention_norm,mlp_norm}/scale [N, D];
    layers/attention/{q,k,v,o}/kernel and layers/mlp/{gate,up,down}/kernel [N, in, out],
    with bias [N, out] and {q_norm,k_norm}/scale [N, Dh] where configured;
    final_norm/scale [D]; lm_head/kernel [D, V] unless tied.
    """

    config: ModelConfig

    def init(self, rng: types.Rng) -> types.Params:
        """Fresh parameters: normal kernels and embeddings, unit norms, zero biases."""
        return _init(self, rng)

    def __call__(
        self,
        params: types.Params,
        tokens_BxL: jax.Array,
        *,
        lora: types.Params | None = None,
        intervene: types.Intervention | None = None,
        taps: Any = None,
        attended: jax.Array | None = None,
        rng: types.Rng | None = None,
        dropout: float | jax.Array = 0.0,
    ) -> types.Outputs:
        """Logits and hidden states of right-padded tokens, positions 0 to L - 1.

        Args:
          params: see the class.
          tokens_BxL: int32; what is padding makes no difference to what precedes it.
          lora: factors {a [N, in, R], b [N, R, out]} at the paths of kernels; alpha / R
            is folded into `a` already.
          intervene: see `core.types.Intervention`.
          taps: pytree with leading axis N; `intervene` gets one slice a layer.
          attended: [B, L], 0 where no token attends to; None: 1 everywhere.
          rng: turns LoRA dropout on, another mask for each layer and projection.
          dropout: rate in [0, 1), of the inputs of `a`.

        Raises:
          UserError: if L exceeds `config.max_length`.
        """
        batch, length = tokens_BxL.shape
        if length > self.config.max_length:
            raise errors.UserError(
                f"model: sequences of {length} tokens, but max_length is "
                f"{self.config.max_length}; shorten the data or load the model with a "
                "larger max_length."
            )
        positions_BxL = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        outputs, _ = self._apply(
            params,
            tokens_BxL,
            positions_BxL,
            None,
            lora,
            intervene,
            taps,
            rng,
            dropout,
            attended=attended,
        )
        return outputs

    def readout(
        self,
        params: types.Params,
        hidden_BxLxD: jax.Array,
        *,
        lora: types.Params | None = None,
    ) -> jax.Array:
        """Logits [B, L, V] of hidden states of any layer: last norm, then head."""
        variables = {"params": params}
        if lora is not None:
            variables["lora"] = lora
        return Readout(self.config).apply(variables, hidden_BxLxD)

    def inputs(
        self,
        params: types.Params,
        tokens_BxL: jax.Array,
        *,
        lora: types.Params | None = None,
        rng: types.Rng | None = None,
        dropout: float | jax.Array = 0.0,
    ) -> types.Params:
        """What every kernel reads: {input [N, B, L, in]} at the paths of the kernels."""
        positions_1xL = jnp.arange(tokens_BxL.shape[1])[None]
        positions_BxL = jnp.broadcast_to(positions_1xL, tokens_BxL.shape)
        _, seen = self._apply(
            params,
            tokens_BxL,
            positions_BxL,
            None,
            lora,
            None,
            None,
            rng,
            dropout,
            mutable=["intermediates"],
        )
        return seen["intermediates"]

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens a row.

        Returns:
          `k`, `v` [N, B, length, kv_heads, Dh]; `positions` int32 [B, length], -1 where
          nothing is stored; `end` int32 [], the next free slot.
        """
        config = self.config
        shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
        return {
            "k": jnp.zeros(shape, config.compute_dtype),
            "v": jnp.zeros(shape, config.compute_dtype),
            "positions": jnp.full((batch, length), -1, jnp.int32),
            "end": jnp.int32(0),
        }

    def decode(
        self,
        params: types.Params,
        tokens_BxL: jax.Array,
        positions_BxL: jax.Array,
        cache: Cache,
        *,
        lora: types.Params | None = None,
        intervene: types.Intervention | None = None,
        taps: Any = None,
        last: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, L, V] of tokens that follow what the cache holds, and the cache.

        Args:
          params: see the class.
          tokens_BxL: int32, the next L tokens of every row.
          positions_BxL: int32, of these tokens; -1 marks padding, which nothing sees
            and whose logits mean nothing.
          cache: of `init_cache` or of the call before. The caller keeps the sum of all
            L within its length: beyond it, the last slots would be overwritten.
          lora: as in `__call__`.
          intervene: as in `__call__`.
          taps: as in `__call__`.
          last: only those of the last token, [B, 1, V]: of a long prompt and a large
            vocabulary the others are the largest array there is.
        """
        outputs, cache = self._apply(
            params,
            tokens_BxL,
            positions_BxL,
            cache,
            lora,
            intervene,
            taps,
            None,
            0.0,
            last=last,
        )
        return outputs.logits, cache

    def _apply(
        self,
        params,
        tokens,
        positions,
        cache,
        lora,
        intervene,
        taps,
        rng,
        dropout,
        *,
        mutable=False,
        attended=None,
        last=False,
    ):
        variables = {"params": params}
        if lora is not None:
            variables["lora"] = lora
        rngs = {} if rng is None else {"dropout": rng}
        module = Decoder(self.config, intervene, last)
        return module.apply(
            variables,
            tokens,
            positions,
            taps,
            dropout,
            cache,
            attended,
            rngs=rngs,
            mutable=mutable,
        )


def _init_uncompiled(model: LanguageModel, rng: types.Rng) -> types.Params:
    zeros_1x1 = jnp.zeros((1, 1), jnp.int32)
    variables = Decoder(model.config).init(rng, zeros_1x1, zeros_1x1, None, 0.0)
    return variables["params"]


_init = jax.jit(_init_uncompiled, static_argnums=0)
