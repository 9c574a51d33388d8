"""A decoder of the Llama architecture: layers stacked and scanned, one hook.

Letters as in `core.types`; M is the length of a key-value cache, G key-value heads.
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.models import rope

SITES = ("embed", "attn", "mlp", "resid")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder; hashable, so models compare by it.

    Attributes:
      width: D. mlp_width: of the gate. head_dim: 0 for width / heads.
      max_length: context that the positions were trained for, in tokens.
      tied: the head is the transposed embedding.
      attention_bias: on q, k and v (Qwen2). output_bias: on o as well.
      qk_norm: RMS norms of q and k per head (Qwen3).
      sliding_window: tokens a query sees, itself included; None: all (Mistral).
      compute_dtype: of matrix products; parameters, norms, softmax and logits stay
        float32.
      remat: recompute each layer in the backward pass.
      unroll: layers per iteration of the scan.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_dim: int = 0
    max_length: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: rope.RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    compute_dtype: str = "float32"
    remat: bool = False
    unroll: int = 1

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.heads


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector as the last axis of an array of the rank of `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nn.Module):
    """`x W (+ bias) (+ (dropout(x) A) B)`; A and B where `lora` holds them."""

    features: int
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, dropout=0.0):
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
        )
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + _row(bias.astype(self.dtype), y)
        if self.has_variable("lora", "a"):
            a = self.get_variable("lora", "a").astype(self.dtype)
            b = self.get_variable("lora", "b").astype(self.dtype)
            if self.has_rng("dropout"):
                keep = jax.random.bernoulli(
                    self.make_rng("dropout"), 1.0 - dropout, x.shape
                )
                x = jnp.where(keep, x / (1.0 - dropout), 0.0).astype(self.dtype)
            y = y + (x @ a) @ b
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, in float32, times a learned scale."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * _row(scale, x)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What every layer of one call sees alike; arrays, or None.

    Attributes:
      angles_BxLxF: rotary angles of the queries.
      mask_BxLxM: which cached keys a query sees; None: causal over the batch itself.
      index: where in the cache the first token of the batch is written.
      dropout: rate of LoRA dropout.
      intervene: the hook.
    """

    angles_BxLxF: jax.Array
    mask_BxLxM: jax.Array | None
    index: jax.Array | None
    dropout: Any
    intervene: types.Intervention | None


class Attention(nn.Module):
    """Grouped-query attention; with a cache, over all that it holds."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxLxD, shared, cache):
        c, dtype = self.config, self.config.compute_dtype
        batch, length, _ = x_BxLxD.shape

        def project(name, heads):
            linear = Linear(heads * c.head_width, dtype, c.attention_bias, name=name)
            y = linear(x_BxLxD, shared.dropout)
            return y.reshape(batch, length, heads, c.head_width)

        q, k = project("q", c.heads), project("k", c.kv_heads)
        v_BxLxGxK = project("v", c.kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.norm_epsilon, name="q_norm")(q)
            k = RMSNorm(c.norm_epsilon, name="k_norm")(k)
        q_BxLxHxK = rope.rotate(q, shared.angles_BxLxF)
        k_BxLxGxK = rope.rotate(k, shared.angles_BxLxF)
        attend = jax.nn.dot_product_attention
        if cache is None:
            window = None if c.sliding_window is None else (c.sliding_window - 1, 0)
            mixed = attend(
                q_BxLxHxK,
                k_BxLxGxK,
                v_BxLxGxK,
                is_causal=True,
                local_window_size=window,
            )
        else:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim,
                start_index=shared.index,
                axis=1,
            )
            cache = {
                "k": write(cache["k"], k_BxLxGxK.astype(cache["k"].dtype)),
                "v": write(cache["v"], v_BxLxGxK.astype(cache["v"].dtype)),
            }
            mixed = attend(
                q_BxLxHxK,
                cache["k"],
                cache["v"],
                mask=shared.mask_BxLxM[:, None],
            )
        flat = mixed.reshape(batch, length, c.heads * c.head_width)
        out = Linear(c.width, dtype, c.output_bias, name="o")(flat, shared.dropout)
        return out, cache


class MLP(nn.Module):
    """SwiGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxLxD, shared):
        c = self.config
        linear = functools.partial(Linear, dtype=c.compute_dtype)
        gate = linear(c.mlp_width, name="gate")(x_BxLxD, shared.dropout)
        up = linear(c.mlp_width, name="up")(x_BxLxD, shared.dropout)
        return linear(c.width, name="down")(nn.silu(gate) * up, shared.dropout)


class Block(nn.Module):
    """One layer; the carry is the residual stream."""

    config: ModelConfig
    shared: Shared

    @nn.compact
    def __call__(self, x_BxLxD, xs):
        layer, tap, cache = xs
        c, shared = self.config, self.shared

        def at(site, hidden_BxLxD):
            if shared.intervene is None:
                return hidden_BxLxD
            return shared.intervene(hidden_BxLxD, site, layer, tap)

        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x_BxLxD)
        attn, cache = Attention(c, name="attention")(normed, shared, cache)
        attn = at("attn", attn)
        x_BxLxD = x_BxLxD + attn
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x_BxLxD)
        mlp = at("mlp", MLP(c, name="mlp")(normed, shared))
        x_BxLxD = at("resid", x_BxLxD + mlp)
        hidden = {"attn": attn, "mlp": mlp, "resid": x_BxLxD}
        return x_BxLxD, (hidden, cache)


class Decoder(nn.Module):
    """Embedding, scanned layers, head."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxL: jax.Array,
        positions_BxL: jax.Array,
        *,
        mask_BxLxM: jax.Array | None = None,
        cache: Any = None,
        index: jax.Array | None = None,
        intervene: types.Intervention | None = None,
        taps: Any = None,
        dropout: Any = 0.0,
    ) -> tuple[types.Outputs, Any]:
        c = self.config
        embedding_VxD = self.param(
            "embed",
            lambda *a: {"embedding": nn.initializers.normal(c.width**-0.5)(*a)},
            (c.vocab_size, c.width),
        )["embedding"]
        frequencies_F = rope.frequencies(c.head_width, c.rope_theta, c.rope_scaling)
        positions = positions_BxL[..., None].astype(jnp.float32)
        angles_BxLxF = positions * frequencies_F[None, None]
        shared = Shared(angles_BxLxF, mask_BxLxM, index, dropout, intervene)

        x_BxLxD = embedding_VxD[tokens_BxL].astype(c.compute_dtype)
        if intervene is not None:
            x_BxLxD = intervene(x_BxLxD, "embed", jnp.int32(0), None)
        embed_BxLxD = x_BxLxD
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.layers,
            unroll=c.unroll,
        )(c, shared, name="layers")
        xs = (jnp.arange(c.layers), taps, cache)
        x_BxLxD, (hidden, cache) = layers(x_BxLxD, xs)
        x_BxLxD = RMSNorm(c.norm_epsilon, name="final_norm")(x_BxLxD)
        if c.tied:
            logits = x_BxLxD @ embedding_VxD.T.astype(c.compute_dtype)
        else:
            logits = Linear(c.vocab_size, c.compute_dtype, name="lm_head")(x_BxLxD)
        hidden = {"embed": embed_BxLxD, **hidden}
        return types.Outputs(logits.astype(jnp.float32), hidden), cache


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder as pure functions of its parameters; see `core.types.Model`.

    Parameters are nested dicts of float32 arrays:
      embed/embedding [V, D], layers/{attention_norm,mlp_norm}/scale [N, D],
      layers/attention/{q,k,v,o}/kernel [N, in, out], layers/mlp/{gate,up,down}/kernel,
      final_norm/scale [D], and lm_head/kernel [D, V] unless tied.
    """

    config: ModelConfig

    def init(self, rng: types.Rng) -> types.Params:
        """Random parameters: normal with deviation fan_in ** -0.5, norm scales one."""
        tokens_BxL = jnp.zeros((1, 2), jnp.int32)
        return Decoder(self.config).init(rng, tokens_BxL, tokens_BxL)["params"]

    def __call__(
        self,
        params: types.Params,
        tokens: jax.Array,
        *,
        lora: types.Params | None = None,
        intervene: types.Intervention | None = None,
        taps: Any = None,
        rng: types.Rng | None = None,
        dropout: float | jax.Array = 0.0,
    ) -> types.Outputs:
        """Causal forward pass of right-padded tokens [B, L] at positions 0 .. L - 1."""
        outputs, _ = Decoder(self.config).apply(
            _variables(params, lora),
            tokens,
            jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
            intervene=intervene,
            taps=taps,
            dropout=dropout,
            rngs=None if rng is None else {"dropout": rng},
        )
        return outputs

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty key-value cache for `length` tokens: {k, v} [N, B, M, G, K]."""
        c = self.config
        shape = (c.layers, batch, length, c.kv_heads, c.head_width)
        return {name: jnp.zeros(shape, c.compute_dtype) for name in ("k", "v")}

    def decode(
        self,
        params: types.Params,
        tokens_BxL: jax.Array,
        positions_BxL: jax.Array,
        mask_BxLxM: jax.Array,
        cache: Any,
        index: jax.Array,
        *,
        intervene: types.Intervention | None = None,
        taps: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Logits [B, L, V] of tokens written to the cache at `index`, and the cache.

        `mask_BxLxM` says which cache entries each token sees, itself included.
        """
        if self.config.sliding_window is not None:
            near_LxM = _window(
                index, tokens_BxL.shape[1], mask_BxLxM, self.config.sliding_window
            )
            mask_BxLxM = mask_BxLxM & near_LxM[None]
        outputs, cache = Decoder(self.config).apply(
            {"params": params},
            tokens_BxL,
            positions_BxL,
            mask_BxLxM=mask_BxLxM,
            cache=cache,
            index=index,
            intervene=intervene,
            taps=taps,
        )
        return outputs.logits, cache


def _variables(params: types.Params, lora: types.Params | None) -> dict[str, Any]:
    return {"params": params} if lora is None else {"params": params, "lora": lora}


def _window(index, length, mask_BxLxM, window):
    """Keys at most `window - 1` entries before the query. Left padding moves both."""
    queries_L = index + jnp.arange(length)
    keys_M = jnp.arange(mask_BxLxM.shape[-1])
    return (queries_L[:, None] - keys_M[None, :]) < window
