"""Other ways to write the same function, for R4: an attack must not care.

Each takes parameters of `models.transformer` and a key, and returns weights of the same
shapes. Adapters are merged already: releases are full weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types

Writing = Callable[[types.Params, types.Rng], types.Params]
WIDEST = 2.0  # Factors of `rescale` lie in [1 / 2, 2]: DESIGN.
# Norms, and the modules that read what they return.
_READERS = {
    "attention_norm": ("attention", ("q", "k", "v")),
    "mlp_norm": ("mlp", ("gate", "up")),
}


def fold_norms(params: types.Params, rng: types.Rng) -> types.Params:
    """Norm scales of 1, their values in the kernels behind them.

    The last norm's goes to the head, and stays where the head is tied.
    """
    del rng
    layers = dict(params["layers"])
    for norm, (group, names) in _READERS.items():
        scale_NxD = layers[norm]["scale"]
        modules = dict(layers[group])
        for name in names:
            kernel_NxDxO = modules[name]["kernel"] * scale_NxD[..., None]
            modules[name] = {**modules[name], "kernel": kernel_NxDxO}
        layers |= {norm: {"scale": jnp.ones_like(scale_NxD)}, group: modules}
    found = {**params, "layers": layers}
    if "lm_head" in params:
        scale_D = params["final_norm"]["scale"]
        kernel_DxV = params["lm_head"]["kernel"] * scale_D[:, None]
        found["lm_head"] = {**params["lm_head"], "kernel": kernel_DxV}
        found["final_norm"] = {"scale": jnp.ones_like(scale_D)}
    return found


def permute_units(params: types.Params, rng: types.Rng) -> types.Params:
    """Hidden units of each MLP in another order."""
    layers, _, width = params["layers"]["mlp"]["up"]["kernel"].shape
    keys = jax.random.split(rng, layers)
    order_NxF = jax.vmap(lambda key: jax.random.permutation(key, width))(keys)
    return _units(
        params,
        lambda x, axis: jnp.take_along_axis(
            x, jnp.expand_dims(order_NxF, 3 - axis), axis
        ),
        ("gate", "up", "down"),
    )


def rescale_units(params: types.Params, rng: types.Rng) -> types.Params:
    """Hidden units of each MLP larger in `up`, smaller in `down`, or the reverse."""
    layers, _, width = params["layers"]["mlp"]["up"]["kernel"].shape
    exponent_NxF = jax.random.uniform(rng, (layers, width), minval=-1, maxval=1)
    factor_NxF = WIDEST**exponent_NxF

    def scaled(x, axis):
        factor = jnp.expand_dims(factor_NxF, 3 - axis)
        return x * factor if axis == 2 else x / factor

    return _units(params, scaled, ("up", "down"))


def _units(params, change, names) -> types.Params:
    """Applies `change(kernel, axis of hidden units)` to modules of the MLPs."""
    mlp = dict(params["layers"]["mlp"])
    for name in names:
        kernel = mlp[name]["kernel"]
        new = change(kernel, 1 if name == "down" else 2).astype(kernel.dtype)
        mlp[name] = {**mlp[name], "kernel": new}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}


def normalise_stream(params: types.Params, rng: types.Rng) -> types.Params:
    """What writes to the residual stream, divided by the embedding's root mean square.

    The norms that read the stream divide a common factor out, but for their epsilon. A
    tied head reads the embedding as well: the last norm makes up for it.
    """
    del rng
    table = params["embed"]["embedding"]
    # Entries of length one, as of a fresh model: width ** -0.5.
    target = table.shape[-1] ** -0.5
    factor = target / jnp.sqrt(jnp.mean(jnp.square(table)))

    def leaf(path, x):
        names = tree.path_names(path)
        writes = names[0] == "embed" or names[-2] in ("o", "down")
        if writes:
            return x * factor
        tied = names[0] == "final_norm" and "lm_head" not in params
        return x / factor if tied else jnp.copy(x)

    return jax.tree_util.tree_map_with_path(leaf, params)


WRITINGS: dict[str, Writing] = {
    "fold_norms": fold_norms,
    "permute_units": permute_units,
    "rescale_units": rescale_units,
    "normalise_stream": normalise_stream,
}


def canonical(params: types.Params, rng: types.Rng) -> types.Params:
    """Norms folded and the stream normalised: scales hide nothing here (decoy M1)."""
    return normalise_stream(fold_norms(params, rng), rng)
