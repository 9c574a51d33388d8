"""Layers by depth: indices published for 32 layers, and models that end early."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.objectives import lens

PUBLISHED = 32  # Layers of the models that the indices in papers are meant for.


def count(model: Callable[..., types.Outputs], *inputs: Any) -> int:
    """Blocks of a model; nothing is computed."""
    return jax.eval_shape(model, *inputs).hidden["resid"].shape[0]


def hidden_states(
    layers: tuple[int, ...], published: tuple[int, ...], blocks: int
) -> tuple[int, ...]:
    """Indices of hidden states in Hugging Face's numbering, sorted.

    `layers` as `lens.chosen` reads them; if empty, those `published` for 32 layers at
    this depth: l becomes floor(l * blocks / 32), at least 1, so that neither the
    embedding nor, unless 32 was, the last, normed state is among them.
    """
    scaled = (max(1, layer * blocks // PUBLISHED) for layer in published)
    return lens.chosen(layers or tuple(scaled), blocks)


def block_indices(
    layers: tuple[int, ...], published: tuple[int, ...], blocks: int
) -> tuple[int, ...]:
    """Indices of blocks from 0, sorted; if empty, floor(l * blocks / 32) of `published`.

    Raises:
      UserError: if the model has no such block.
    """
    scaled = (layer * blocks // PUBLISHED for layer in published)
    found = tuple(sorted(set(layers or scaled)))
    if found[0] < 0 or found[-1] >= blocks:
        raise errors.UserError(
            f"layers={layers}: give indices of blocks, 0 to {blocks - 1}, or () for "
            f"those published for {PUBLISHED} layers at this depth."
        )
    return found


def truncated(
    model: Callable[..., types.Outputs], kept: int, blocks: int
) -> Callable[..., types.Outputs]:
    """The model as if it ended after `kept` of its blocks; last norm and head stay.

    The others are computed, and add nothing.
    """
    if kept >= blocks:
        return model

    def silence(hidden_BxLxD, site, layer, tap):
        del tap
        if site not in ("attn", "mlp"):
            return hidden_BxLxD
        return jnp.where(layer < kept, hidden_BxLxD, 0)

    def cut(*inputs: Any, **hooks: Any) -> types.Outputs:
        outputs = model(*inputs, intervene=silence, **hooks)
        inner = {name: outputs.hidden[name][:kept] for name in ("attn", "mlp", "resid")}
        return outputs.replace(hidden={**outputs.hidden, **inner})

    return cut
