"""The smallest thing with the interface of a model: four leaves, no attention.

For tests of methods: it compiles in a fraction of a transformer's time, and has its
sites, its stacked kernels, its LoRA and its names.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.models import layers

LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Toy:
    """Each layer adds the mean of what came before, then a small network of the sum.

    Parameters: embed/embedding [V, D], layers/mix/up/kernel and layers/mix/down/kernel
    [2, D, D], lm_head/kernel [D, V].
    """

    vocab: int = 11
    width: int = 8

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, rng: types.Rng) -> types.Params:
        """Normal parameters of deviation width ** -0.5."""

        def normal(i: int, *shape: int) -> jax.Array:
            return self.width**-0.5 * jax.random.normal(
                jax.random.fold_in(rng, i), shape
            )

        square = (LAYERS, self.width, self.width)
        return {
            "embed": {"embedding": normal(0, self.vocab, self.width)},
            "layers": {
                "mix": {
                    "up": {"kernel": normal(1, *square)},
                    "down": {"kernel": normal(2, *square)},
                }
            },
            "lm_head": {"kernel": normal(3, self.width, self.vocab)},
        }

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
        """See `core.types.Model`; computes in the dtype of the embedding."""
        return self._run(
            params, tokens_BxL, lora, intervene, taps, rng, dropout, attended
        )[0]

    def inputs(
        self,
        params: types.Params,
        tokens_BxL: jax.Array,
        *,
        lora: types.Params | None = None,
        rng: types.Rng | None = None,
        dropout: float | jax.Array = 0.0,
    ) -> types.Params:
        """See `transformer.LanguageModel.inputs`; of the stacked kernels only."""
        return self._run(params, tokens_BxL, lora, None, None, rng, dropout)[1]

    # Inlined where it is traced; one program, not a dozen, where a test calls it.
    @functools.partial(jax.jit, static_argnames=("self", "intervene"), inline=True)
    def _run(
        self,
        params,
        tokens_BxL,
        lora,
        intervene,
        taps,
        rng,
        dropout,
        attended_BxL=None,
    ):
        edit = layers.editor(intervene)
        lora = lora or {}
        rngs = None if rng is None else jax.random.split(rng, (LAYERS + 1, 2))
        embed_BxLxD = params["embed"]["embedding"][tokens_BxL]
        embed_BxLxD = edit(embed_BxLxD, "embed", jnp.int32(0), None)

        def block(x_BxLxD, inputs):
            layer, tap, weights, factors, rngs = inputs
            up_rng, down_rng = (None, None) if rngs is None else rngs

            def project(x_BxLxD, name, rng):
                low = factors.get(name)
                return _project(x_BxLxD, weights[name], low, rng, dropout)

            attn_BxLxD = edit(_mean_so_far(x_BxLxD, attended_BxL), "attn", layer, tap)
            x_BxLxD = x_BxLxD + attn_BxLxD
            inputs = {"up": {"input": x_BxLxD}}
            inner_BxLxD = jnp.tanh(project(x_BxLxD, "up", up_rng))
            inputs["down"] = {"input": inner_BxLxD}
            mlp_BxLxD = project(inner_BxLxD, "down", down_rng)
            mlp_BxLxD = edit(mlp_BxLxD, "mlp", layer, tap)
            x_BxLxD = edit(x_BxLxD + mlp_BxLxD, "resid", layer, tap)
            hidden = {"attn": attn_BxLxD, "mlp": mlp_BxLxD, "resid": x_BxLxD}
            return x_BxLxD, (hidden, inputs)

        inputs = (
            jnp.arange(LAYERS, dtype=jnp.int32),
            taps,
            params["layers"]["mix"],
            lora.get("layers", {}).get("mix", {}),
            None if rngs is None else rngs[:LAYERS],
        )
        x_BxLxD, (hidden, inputs) = jax.lax.scan(
            block, embed_BxLxD, inputs, unroll=True
        )
        logits_BxLxV = _project(
            x_BxLxD,
            params["lm_head"],
            lora.get("lm_head"),
            None if rngs is None else rngs[LAYERS, 0],
            dropout,
        )
        wide = jnp.promote_types(logits_BxLxV.dtype, jnp.float32)
        hidden = {"embed": embed_BxLxD, **hidden, "final": x_BxLxD}
        outputs = types.Outputs(logits_BxLxV.astype(wide), hidden)
        return outputs, {"layers": {"mix": inputs}}

    def readout(
        self,
        params: types.Params,
        hidden_BxLxD: jax.Array,
        *,
        lora: types.Params | None = None,
    ) -> jax.Array:
        """See `core.types.Model`; there is no norm before the head."""
        factors = (lora or {}).get("lm_head")
        logits_BxLxV = _project(hidden_BxLxD, params["lm_head"], factors, None, 0.0)
        wide = jnp.promote_types(logits_BxLxV.dtype, jnp.float32)
        return logits_BxLxV.astype(wide)


def _project(x_BxLxD, module, factors, rng, dropout):
    """`x W + (dropout(x) A) B`, in the dtype of x."""
    y = layers.dot(x_BxLxD, module["kernel"])
    if factors is None:
        return y
    if rng is not None:
        x_BxLxD = layers.drop(x_BxLxD, rng, dropout)
    return y + layers.dot(layers.dot(x_BxLxD, factors["a"]), factors["b"])


def _mean_so_far(x_BxLxD: jax.Array, attended_BxL: jax.Array | None) -> jax.Array:
    """Mean over each token and those before it: causal, as attention would be."""
    length, dtype = x_BxLxD.shape[1], x_BxLxD.dtype
    weights_LxL = jnp.tril(jnp.ones((length, length), dtype))
    if attended_BxL is None:
        weights_LxL /= jnp.arange(1, length + 1, dtype=dtype)[:, None]
        return jnp.einsum("ts,bsd->btd", weights_LxL, x_BxLxD)
    weights_BxLxL = weights_LxL[None] * attended_BxL[:, None].astype(dtype)
    weights_BxLxL /= jnp.maximum(jnp.sum(weights_BxLxL, -1, keepdims=True), 1)
    return jnp.einsum("bts,bsd->btd", weights_BxLxL, x_BxLxD)
