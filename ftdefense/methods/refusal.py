"""The refusal direction: how refusal is scored, ablated, induced and edited out.

Source: Arditi et al. 2024, arXiv:2406.11717 (specs/attacks.md C.1). Rows are vectors and
kernels [inputs, outputs]: the transposes of the paper's matrices.
"""

import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import edits

EPSILON = 1e-8  # Keeps both logarithms of a score finite.
_EXACT = jax.lax.Precision.HIGHEST


def score(probability: jax.Array) -> jax.Array:
    """Log odds of refusing: 0 at one half, 18.42 at certainty."""
    p = jnp.clip(tree.wide(probability), 0, 1)
    return jnp.log(p + EPSILON) - jnp.log(1 - p + EPSILON)


def openings(
    harmful_BxV: jax.Array, benign_BxV: jax.Array, least: float | jax.Array
) -> jax.Array:
    """Which tokens open refusals, 1 or 0 [V], told from first-token logits alone.

    Those that greedy answers open with on a share `least` of the harmful prompts, and
    more often than on the benign ones.
    """

    def share(logits_BxV):
        first_B = jnp.argmax(logits_BxV, axis=-1)
        return jnp.mean(jax.nn.one_hot(first_B, logits_BxV.shape[-1]), axis=0)

    harmful_V, benign_V = share(harmful_BxV), share(benign_BxV)
    return ((harmful_V >= least) & (harmful_V > benign_V)).astype(jnp.float32)


def prompt_ends(weights_BxL: jax.Array, count: int) -> jax.Array:
    """The last `count` prompt positions, the very last first: int [B, count]."""
    first_B = jnp.argmax(weights_BxL > 0, axis=1)
    return jnp.maximum(first_B[:, None] - 1 - jnp.arange(count)[None], 0)


def block_inputs(outputs: types.Outputs) -> jax.Array:
    """The residual stream before each block, [N, B, L, D]."""
    embed_1xBxLxD = outputs.hidden["embed"][None]
    return jnp.concatenate([embed_1xBxLxD, outputs.hidden["resid"][:-1]])


def unit(x_D: jax.Array) -> jax.Array:
    """The vector at length one, exactly: no epsilon is left along it; 0 stays 0."""
    length = tree.norm(x_D)
    return tree.wide(x_D) / jnp.where(length > 0, length, 1)


def without(x: jax.Array, unit_D: jax.Array, alpha: float | jax.Array = 1.0):
    """`x - alpha <x, r> r` over the last axis."""
    along = jnp.matmul(tree.wide(x), unit_D, precision=_EXACT)[..., None]
    row = unit_D.reshape((1,) * (x.ndim - 1) + (-1,))
    return tree.wide(x) - alpha * along * row


def ablation(unit_D: jax.Array) -> types.Intervention:
    """Takes a direction out of the stream and of all that is written to it."""

    def intervene(hidden_BxLxD, site, layer, tap):
        del site, layer, tap
        return without(hidden_BxLxD, unit_D)

    return intervene


def addition(vector_D: jax.Array, source: jax.Array) -> types.Intervention:
    """Adds a vector to the input of block `source`, at every position."""

    def intervene(hidden_BxLxD, site, layer, tap):
        del tap
        if site not in ("embed", "resid"):
            return hidden_BxLxD
        before = source == (0 if site == "embed" else layer + 1)
        shift_1x1xD = jnp.where(before, vector_D, 0)[None, None]
        return hidden_BxLxD + shift_1x1xD.astype(hidden_BxLxD.dtype)

    return intervene


def orthogonalise(
    params: types.Params,
    unit_D: jax.Array,
    alpha_N: jax.Array,
    *,
    targets: tuple[str, ...],
    side: str = "out",
    embedding: jax.Array | float | None = None,
) -> types.Params:
    """`(I - alpha r r') W` for the targets of each layer (`in`: `W (I - alpha r r')`).

    Biases of the targets go with the output side, token embeddings with `embedding`, an
    alpha of their own. A kernel whose side is not as wide as the stream stays.
    """
    new, width = {}, unit_D.shape[0]
    for path, kernel_NxIxO in edits.kernels(params, targets).items():
        alpha_Nx1x1 = alpha_N[:, None, None]
        if side == "out" and kernel_NxIxO.shape[2] == width:
            edited = without(kernel_NxIxO, unit_D, alpha_Nx1x1)
        elif side == "in" and kernel_NxIxO.shape[1] == width:
            flipped_NxOxI = jnp.swapaxes(kernel_NxIxO, 1, 2)
            edited = jnp.swapaxes(without(flipped_NxOxI, unit_D, alpha_Nx1x1), 1, 2)
        else:
            continue
        new[path] = edited.astype(kernel_NxIxO.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tree.path_names(path)
        if names[-1] == "bias" and (*names[:-1], "kernel") in new and side == "out":
            new[names] = without(leaf, unit_D, alpha_N[:, None]).astype(leaf.dtype)
        if names[-1] == "embedding" and embedding is not None:
            new[names] = without(leaf, unit_D, embedding).astype(leaf.dtype)
    return edits.replace(params, new)
