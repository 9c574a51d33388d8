"""The parts of a decoder as Linen modules; see `transformer` for the whole."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftdefense.core import draws
from ftdefense.core import types
from ftdefense.models import configuration
from ftdefense.models import rope

Cache = dict[str, jax.Array]


class Projection(nn.Module):
    """`x W (+ bias) (+ (dropout(x) A) B)`: W + A B is never formed.

    Products are in the dtype of `x`; the factors are read from the collection `lora`
    at this module's own path, where `x` itself goes to `intermediates`, if asked for.

    Attributes:
      features: width of the result.
      init_scale: standard deviation of the initial kernel; 0: fan_in ** -0.5.
      shrink: divides it.
      bias: whether one is added.
      out_dtype: of the result; None: the dtype of `x`.
    """

    features: int
    init_scale: float = 0.0
    shrink: float = 1.0
    bias: bool = False
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, dropout: Any) -> jax.Array:
        scale = (self.init_scale or x.shape[-1] ** -0.5) / self.shrink
        initializer = nn.initializers.normal(scale)
        kernel = self.param("kernel", initializer, (x.shape[-1], self.features))
        self.sow("intermediates", "input", x, lambda _, x: x, lambda: None)
        y = dot(x, kernel, self.out_dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype)[None, None]
        if self.has_variable("lora", "a"):
            if self.has_rng("dropout"):
                x = drop(x, self.make_rng("dropout"), dropout)
            low = dot(x, self.get_variable("lora", "a"))
            y = y + dot(low, self.get_variable("lora", "b"), self.out_dtype)
        return y


def dot(x_BxLxD: jax.Array, kernel: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`x @ kernel` with operands in the dtype of `x`."""
    # Tokens as one axis: on a CPU the gradient of the kernel takes half the time.
    batch, length, width = x_BxLxD.shape
    flat = x_BxLxD.reshape(batch * length, width)
    y = jnp.dot(flat, kernel.astype(flat.dtype), preferred_element_type=out_dtype)
    return y.reshape(batch, length, -1)


def drop(x: jax.Array, rng: types.Rng, rate: float | jax.Array) -> jax.Array:
    """Zeroes entries at `rate` in [0, 1), and scales the rest to keep the mean."""
    kept = draws.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(square + self.epsilon)
        return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    config: configuration.ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        mask_BxLxS: jax.Array | None,
        dropout: Any,
        cache: Cache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config

        def heads(name: str, count: int) -> jax.Array:
            features = count * config.head_dim
            flat = Projection(
                features, config.init_scale, bias=config.attention_bias, name=name
            )(x_BxLxD, dropout)
            return flat.reshape(*flat.shape[:-1], count, config.head_dim)

        q_BxLxHxC = heads("q", config.heads)
        k_BxLxGxC = heads("k", config.kv_heads)
        v_BxLxGxC = heads("v", config.kv_heads)
        if config.qk_norm:
            q_BxLxHxC = RMSNorm(config.norm_epsilon, name="q_norm")(q_BxLxHxC)
            k_BxLxGxC = RMSNorm(config.norm_epsilon, name="k_norm")(k_BxLxGxC)
        q_BxLxHxC = rope.rotate(q_BxLxHxC, turn)
        k_BxLxGxC = rope.rotate(k_BxLxGxC, turn)
        if cache is None:
            window = config.sliding_window
            mixed = jax.nn.dot_product_attention(
                q_BxLxHxC,
                k_BxLxGxC,
                v_BxLxGxC,
                mask=None if mask_BxLxS is None else mask_BxLxS[:, None],
                is_causal=True,
                local_window_size=None if window is None else (window - 1, 0),
            )
        else:
            cache, k_BxSxGxC, v_BxSxGxC = _write(cache, layer, k_BxLxGxC, v_BxLxGxC)
            mixed = jax.nn.dot_product_attention(
                q_BxLxHxC, k_BxSxGxC, v_BxSxGxC, mask=mask_BxLxS[:, None]
            )
        o = Projection(
            config.width,
            config.init_scale,
            _shrink(config),
            config.output_bias,
            name="o",
        )
        return o(mixed.reshape(*mixed.shape[:2], -1), dropout), cache


def _write(
    cache: Cache, layer: jax.Array, k_BxLxGxC: jax.Array, v_BxLxGxC: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Stores keys and values at `end` of one layer; returns all that it holds."""
    start = (layer, 0, cache["end"], 0, 0)
    stored = {
        name: jax.lax.dynamic_update_slice(
            cache[name], new[None].astype(cache[name].dtype), start
        )
        for name, new in (("k", k_BxLxGxC), ("v", v_BxLxGxC))
    }
    k, v = (
        jax.lax.dynamic_index_in_dim(stored[name], layer, keepdims=False)
        for name in ("k", "v")
    )
    return {**cache, **stored}, k, v


def _shrink(config: configuration.ModelConfig) -> float:
    """Keeps the variance of the residual stream from growing with depth."""
    return (2 * config.layers) ** 0.5 if config.residual_init else 1.0


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    config: configuration.ModelConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, dropout: Any) -> jax.Array:
        config = self.config
        inner = (config.mlp_width, config.init_scale)
        gate_BxLxF = Projection(*inner, name="gate")(x_BxLxD, dropout)
        up_BxLxF = Projection(*inner, name="up")(x_BxLxD, dropout)
        down = Projection(config.width, config.init_scale, _shrink(config), name="down")
        return down(nn.silu(gate_BxLxF) * up_BxLxF, dropout)


class Block(nn.Module):
    """One layer in the form that `nn.scan` wants: (carry, inputs) -> (carry, outputs).

    The carry is (residual stream, cache or None); the outputs are the hidden states.
    """

    config: configuration.ModelConfig
    intervene: types.Intervention | None

    @nn.compact
    def __call__(self, carry, layer, tap, turn, mask_BxLxS, dropout):
        config, (x_BxLxD, cache) = self.config, carry
        edit = editor(self.intervene)
        normed = RMSNorm(config.norm_epsilon, name="attention_norm")(x_BxLxD)
        attn_BxLxD, cache = Attention(config, name="attention")(
            normed, turn, mask_BxLxS, dropout, cache, layer
        )
        attn_BxLxD = edit(attn_BxLxD, "attn", layer, tap)
        x_BxLxD = x_BxLxD + attn_BxLxD
        normed = RMSNorm(config.norm_epsilon, name="mlp_norm")(x_BxLxD)
        mlp_BxLxD = MLP(config, name="mlp")(normed, dropout)
        mlp_BxLxD = edit(mlp_BxLxD, "mlp", layer, tap)
        x_BxLxD = edit(x_BxLxD + mlp_BxLxD, "resid", layer, tap)
        hidden = {"attn": attn_BxLxD, "mlp": mlp_BxLxD, "resid": x_BxLxD}
        return (x_BxLxD, cache), hidden


def editor(intervene: types.Intervention | None):
    """The intervention, or the identity; what it returns keeps the stream's dtype."""

    def edit(hidden_BxLxD, site, layer, tap):
        if intervene is None:
            return hidden_BxLxD
        edited = intervene(hidden_BxLxD, site, layer, tap)
        return edited.astype(hidden_BxLxD.dtype)

    return edit
