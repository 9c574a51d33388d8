"""A model with four leaves and no attention, for contract tests and closed forms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import types


@dataclasses.dataclass(frozen=True)
class Toy:
    """Two causal-mean layers over embeddings; kernels that LoRA can adapt.

    Parameters: embed/embedding [V, D], layers/mix/up/kernel and layers/mix/down/kernel
    [2, D, D], lm_head/kernel [D, V].
    """

    vocab_size: int = 11
    width: int = 8

    def init(self, rng: types.Rng) -> types.Params:
        """Random parameters with deviation 0.3."""
        shapes = {
            "embed": {"embedding": (self.vocab_size, self.width)},
            "layers": {
                "mix": {
                    "up": {"kernel": (2, self.width, self.width)},
                    "down": {"kernel": (2, self.width, self.width)},
                }
            },
            "lm_head": {"kernel": (self.width, self.vocab_size)},
        }
        leaves, structure = jax.tree.flatten(
            shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        keys = jax.random.split(rng, len(leaves))
        return jax.tree.unflatten(
            structure,
            [0.3 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)],
        )

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
        """See `core.types.Model`; dropout is not modelled."""
        del rng, dropout

        def at(site, hidden, layer):
            if intervene is None:
                return hidden
            tap = None
            if layer is not None:
                tap = jax.tree.map(lambda leaf: leaf[layer], taps)
            return intervene(hidden, site, jnp.int32(layer or 0), tap)

        def linear(x, name, layer):
            y = x @ params["layers"]["mix"][name]["kernel"][layer]
            factors = ((lora or {}).get("layers", {}).get("mix", {})).get(name)
            if factors is None:
                return y
            return y + (x @ factors["a"][layer]) @ factors["b"][layer]

        length = tokens.shape[1]
        mean = jnp.tril(jnp.ones((length, length), params["lm_head"]["kernel"].dtype))
        mean = mean / jnp.sum(mean, axis=-1, keepdims=True)
        x = at("embed", params["embed"]["embedding"][tokens], None)
        embed, hidden = x, {"attn": [], "mlp": [], "resid": []}
        for layer in range(2):
            attn = at("attn", jnp.einsum("ts,bsd->btd", mean, x), layer)
            mlp = linear(jnp.tanh(linear(x + attn, "up", layer)), "down", layer)
            mlp = at("mlp", mlp, layer)
            x = at("resid", x + attn + mlp, layer)
            for name, value in (("attn", attn), ("mlp", mlp), ("resid", x)):
                hidden[name].append(value)
        stacked = {name: jnp.stack(values) for name, values in hidden.items()}
        logits = x @ params["lm_head"]["kernel"]
        return types.Outputs(logits, {"embed": embed, **stacked})
