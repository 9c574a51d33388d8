"""A network that reads what kernels read, and writes low-rank patches of them.

Source: AntiDote, Sanyal et al. 2025, arXiv:2509.08000; code read at respailab/Antidote
6e12f6a (specs: perturbation_and_meta 5.5). One network serves all layers.
"""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import patches
from ftdefense.models import layers

BLOCKS = 2  # Residual feed-forward blocks.
EXPANSION = 3  # Of their inner width.
# Kernels that read what another one reads: the attention over it is shared.
READ_ALIKE = {"k": "q", "v": "q", "gate": "up"}
_NORM_EPSILON = 1e-5

Paths = Mapping[str, tuple[str, ...]]


def init(
    rng: types.Rng, params: types.Params, paths: Paths, rank: int, width: int
) -> types.Params:
    """Xavier kernels, zero biases, in float32 or wider, for the kernels at `paths`."""
    kernels = {name: patches.at(params, path)["kernel"] for name, path in paths.items()}
    shapes = {name: kernel.shape[1:] for name, kernel in kernels.items()}
    dtype = jnp.promote_types(*{k.dtype for k in kernels.values()}, jnp.float32)
    widths_in = sorted({width_in for width_in, _ in shapes.values()})
    rngs = iter(
        jax.random.split(rng, len(widths_in) + 2 + 2 * BLOCKS + 2 * len(shapes))
    )

    def linear(width_in, width_out, kind="normal"):
        draw = jax.nn.initializers.variance_scaling(1.0, "fan_avg", kind)
        kernel = draw(next(rngs), (width_in, width_out), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(width_out, dtype)}

    def block():
        return {
            "norm": {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)},
            "up": linear(width, EXPANSION * width),
            "down": linear(EXPANSION * width, width),
        }

    return {
        "read": {str(width_in): linear(width_in, width) for width_in in widths_in},
        "qkv": linear(width, 3 * width, "uniform"),
        "out": linear(width, width),
        "body": {str(i): block() for i in range(BLOCKS)},
        "a": {name: linear(width, rank * shape[0]) for name, shape in shapes.items()},
        "b": {name: linear(width, rank * shape[1]) for name, shape in shapes.items()},
    }


def write(
    phi: types.Params,
    inputs: types.Params,
    paths: Paths,
    heads: int,
    rng: types.Rng | None = None,
    dropout: float | jax.Array = 0.0,
) -> types.Params:
    """Factors {a [N, in, R], b [N, R, out]} at `paths`; `rng` turns dropout on.

    Args:
      inputs: {input [N, B, L, in]} at `paths`. All tokens count, padding too.
    """
    groups: dict[str, list[str]] = {}
    for name in paths:
        groups.setdefault(READ_ALIKE.get(name, name), []).append(name)
    found = {}
    for i, names in enumerate(groups.values()):
        x_NxBxLxI = patches.at(inputs, paths[names[0]])["input"]
        count, *_, width_in = x_NxBxLxI.shape
        x_NxTxI = x_NxBxLxI.reshape(count, -1, width_in)
        rngs = None
        if rng is not None:
            rngs = jax.random.split(jax.random.fold_in(rng, i), (count, len(names)))

        def factors(xs, names=names):
            x_TxI, rngs = xs
            x_1xE = attended(phi, x_TxI, heads)
            codes = [
                transformed(phi, x_1xE, None if rngs is None else rngs[j], dropout)
                for j in range(len(names))
            ]
            return {
                name: {side: _linear(phi[side][name], code)[0] for side in "ab"}
                for name, code in zip(names, codes, strict=True)
            }

        # One layer at a time: the attention over T tokens is the largest array here.
        flat = jax.lax.map(jax.checkpoint(factors), (x_NxTxI, rngs))
        for name in names:
            u_NxRxI = flat[name]["a"].reshape(count, -1, width_in)
            v_NxOxR = flat[name]["b"].reshape(count, -1, u_NxRxI.shape[1])
            a_b = (jnp.swapaxes(x, 1, 2) for x in (u_NxRxI, v_NxOxR))
            found[paths[name]] = dict(zip("ab", a_b, strict=True))
    return patches.nest(found)


def attended(phi: types.Params, x_TxI: jax.Array, heads: int) -> jax.Array:
    """[1, E]: the mean of what every token attends to."""
    x_TxE = _linear(phi["read"][str(x_TxI.shape[-1])], x_TxI)
    tokens, width = x_TxE.shape
    qkv = _linear(phi["qkv"], x_TxE).reshape(tokens, 3, heads, -1)
    q_TxHxC, k_TxHxC, v_TxHxC = (qkv[:, i] for i in range(3))
    scores_HxTxT = jnp.einsum("thc,shc->hts", q_TxHxC, k_TxHxC)
    scores_HxTxT = scores_HxTxT / math.sqrt(width // heads)
    # What follows is linear, so the mean over the tokens that attend may come first.
    share_HxT = jnp.mean(jax.nn.softmax(scores_HxTxT), axis=1)
    x_1xE = jnp.einsum("hs,shc->hc", share_HxT, v_TxHxC).reshape(1, width)
    return _linear(phi["out"], x_1xE)


def transformed(
    phi: types.Params,
    x_1xE: jax.Array,
    rng: types.Rng | None,
    dropout: float | jax.Array,
) -> jax.Array:
    """Through the residual feed-forward blocks."""
    for i in range(BLOCKS):
        block = phi["body"][str(i)]
        inner = _linear(block["up"], _norm(block["norm"], x_1xE))
        y_1xE = _linear(block["down"], jax.nn.gelu(inner, approximate=False))
        if rng is not None:
            y_1xE = layers.drop(y_1xE, jax.random.fold_in(rng, i), dropout)
        x_1xE = x_1xE + y_1xE
    return x_1xE


def _linear(module: types.Params, x_TxI: jax.Array) -> jax.Array:
    x_TxI = x_TxI.astype(module["kernel"].dtype)
    return x_TxI @ module["kernel"] + module["bias"][None]


def _norm(module: types.Params, x_TxE: jax.Array) -> jax.Array:
    centred = x_TxE - jnp.mean(x_TxE, -1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + _NORM_EPSILON)
    return centred / spread * module["scale"][None] + module["bias"][None]
