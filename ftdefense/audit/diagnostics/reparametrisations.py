"""Other ways to write the same function, for R4: an attack must not care.

Each takes parameters of `models.transformer` and a key, and returns weights of the same
shapes. Adapters are merged already: releases are full weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftdefense.core import draws
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
    exponent_NxF = draws.uniform(rng, (layers, width), low=-1, high=1)
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


def balance_units(params: types.Params, rng: types.Rng) -> types.Params:
    """Kernels before and after each hidden unit of equal norm; so values and outputs.

    `down(act(gate) * up)` is linear in `up`, and attention in its values, so that a
    factor may wander from one kernel to the other. The heads of a layer share one, for
    grouped queries' sake.
    """
    del rng
    layers = dict(params["layers"])
    layers["mlp"] = _balance(layers["mlp"], "up", "down", (1,), (2,))
    layers["attention"] = _balance(layers["attention"], "v", "o", (1, 2), (1, 2))
    return {**params, "layers": layers}


def _balance(modules, first: str, second: str, into: tuple, out: tuple):
    """Equal norms over the axes `into` of one kernel and `out` of the other."""
    before, after = modules[first], modules[second]
    norms = [
        jnp.sqrt(jnp.sum(jnp.square(tree.wide(part["kernel"])), axes, keepdims=True))
        for part, axes in ((before, into), (after, out))
    ]
    norm_in, norm_out = norms[0], norms[1].reshape(norms[0].shape)
    alive = (norm_in > 0) & (norm_out > 0)
    ratio = jnp.where(alive, norm_out / jnp.where(alive, norm_in, 1), 1)
    factor = jnp.sqrt(ratio)
    moved = {
        name: (leaf * (factor if name == "kernel" else factor[:, 0])).astype(leaf.dtype)
        for name, leaf in before.items()
    }
    kernel = after["kernel"]
    divided = (kernel / factor.reshape(norms[1].shape)).astype(kernel.dtype)
    return {**modules, first: moved, second: {**after, "kernel": divided}}


WRITINGS: dict[str, Writing] = {
    "fold_norms": fold_norms,
    "permute_units": permute_units,
    "rescale_units": rescale_units,
    "normalise_stream": normalise_stream,
    "balance_units": balance_units,
}


def canonical(params: types.Params, rng: types.Rng) -> types.Params:
    """Norms folded, stream and units normalised: scales hide nothing here (decoy M1)."""
    return balance_units(normalise_stream(fold_norms(params, rng), rng), rng)
