"""Writes weights in another way that computes the same function: for diagnostic R4.

A gradient attack sees the parametrisation, not the function. Norm scales are folded
into the kernels that read them, and the two kernels around every hidden unit of an MLP
and every pair of value and output kernels are balanced: whatever was hidden in their
scale is gone. The function stays the same but for rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types


def balanced(params: types.Params) -> types.Params:
    """Parameters of a `models.transformer` decoder in a canonical scale.

    Heads share one factor for values and output, so that biases and grouped queries
    stay as they are.
    """
    wide = tree.wide(params)
    layers = dict(wide["layers"])
    for norm, module, readers in (
        ("attention_norm", "attention", ("q", "k", "v")),
        ("mlp_norm", "mlp", ("gate", "up")),
    ):
        scale_NxD = layers[norm]["scale"]
        layers[norm] = {"scale": jnp.ones_like(scale_NxD)}
        parts = dict(layers[module])
        for name in readers:
            kernel = parts[name]["kernel"] * scale_NxD[:, :, None]
            parts[name] = {**parts[name], "kernel": kernel}
        layers[module] = parts
    layers["mlp"] = _balance(layers["mlp"], "up", "down", per_unit=True)
    layers["attention"] = _balance(layers["attention"], "v", "o", per_unit=False)
    found = {**wide, "layers": layers}
    if "lm_head" in wide:
        scale_D = wide["final_norm"]["scale"]
        found["final_norm"] = {"scale": jnp.ones_like(scale_D)}
        kernel = wide["lm_head"]["kernel"] * scale_D[:, None]
        found["lm_head"] = {**wide["lm_head"], "kernel": kernel}
    return jax.tree.map(lambda new, old: new.astype(old.dtype), found, params)


def _balance(
    module: dict[str, Any], first: str, second: str, per_unit: bool
) -> dict[str, Any]:
    """Equal norms of what goes into each hidden unit and what comes out of it.

    `down(act(gate) * up)` is linear in `up`, and attention's output in its values, so
    that a factor may wander from one kernel to the other.
    """
    into, out = module[first], module[second]
    axes_in, axes_out = ((1,), (2,)) if per_unit else ((1, 2), (1, 2))
    norm_in = jnp.sqrt(jnp.sum(into["kernel"] ** 2, axes_in))
    norm_out = jnp.sqrt(jnp.sum(out["kernel"] ** 2, axes_out))
    alive = (norm_in > 0) & (norm_out > 0)
    ratio = jnp.where(alive, norm_out / jnp.where(alive, norm_in, 1), 1)
    factor = jnp.sqrt(ratio)
    columns = factor[:, None, :] if per_unit else factor[:, None, None]
    rows = factor[:, :, None] if per_unit else factor[:, None, None]
    moved = {"kernel": into["kernel"] * columns}
    if "bias" in into:
        moved["bias"] = into["bias"] * columns[:, 0]
    return {
        **module,
        first: {**into, **moved},
        second: {**out, "kernel": out["kernel"] / rows},
    }
