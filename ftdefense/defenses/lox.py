"""LoX: move on along the directions in which alignment moved the weights.

Stage        alignment; a weight edit after it, without training.
Starts from  aligned
Template     T1 basin
Strategy     anchoring
Minimises    nothing: W_aligned + alpha * P_k(W_aligned - W_pretrained) per matrix, with
             P_k the truncated singular value decomposition of rank k, in float32.
Source       Perin et al. 2025, arXiv:2506.15606; code read at VITA-Group/LoX 9213ce6.
Evidence     CODE for the rule and its scope (every tensor of two axes or more,
             embeddings and head included); k = 6, alpha = 1.25 for Llama-2-7B.
Licence      no licence file found; rewritten from the formulas.
Differs      stacked layers are split into their matrices first. Rows of a vocabulary
             that one of the two models lacks are left as they are.
Reduces to   the identity at alpha = 0.
Cost         one singular value decomposition per matrix.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

STARTS_FROM = "aligned"
NEEDS = ("pretrained",)


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    alpha: float = 1.25  # Length of the extrapolation, relative to the alignment's.
    k: int = 6  # Directions per matrix; 0: all.


def truncate(matrix: jax.Array, k: int | jax.Array) -> jax.Array:
    """Best approximation of rank `k` of [..., M, N] in the Frobenius norm; 0: all."""
    u, s, vt = jnp.linalg.svd(tree.wide(matrix), full_matrices=False)
    kept = jnp.where((jnp.arange(s.shape[-1]) < k) | (k == 0), s, 0.0)
    return jnp.matmul(u * kept[..., None, :], vt, precision=jax.lax.Precision.HIGHEST)


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    """Extrapolates every matrix from the pretrained through the aligned weights.

    Raises:
      UserError: without either of them, or if they are of different shapes.
    """
    if lineage.aligned is None or lineage.pretrained is None:
        raise errors.UserError(
            "lox needs the weights before and after alignment; give the pretrained "
            "folder with --pretrained."
        )

    def extrapolate(path, decays, aligned, pretrained):
        if not decays:
            return jnp.copy(aligned)
        common = _common(tree.path_names(path), aligned, pretrained)
        moved = tree.wide(aligned[common]) - tree.wide(pretrained[common])
        beyond = tree.add_scale(aligned[common], hp.alpha, truncate(moved, hp.k))
        return jnp.asarray(aligned).at[common].set(beyond)

    return jax.tree_util.tree_map_with_path(
        extrapolate,
        optimizers.matrices(lineage.aligned),
        lineage.aligned,
        lineage.pretrained,
    )


def _common(path: tuple[str, ...], aligned, pretrained) -> tuple[slice, ...]:
    """Where both are defined: all of it, or the vocabulary that they share."""
    sizes = list(zip(aligned.shape, pretrained.shape, strict=True))
    vocabulary = {"embed": 0, "lm_head": 1}.get(path[0])
    if any(a != b for axis, (a, b) in enumerate(sizes) if axis != vocabulary):
        raise errors.UserError(
            f"lox: {'/'.join(path)} is {aligned.shape} in the aligned model and "
            f"{pretrained.shape} in --pretrained: they are different models."
        )
    return tuple(slice(min(size)) for size in sizes)


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(alpha=0.25)),
    "paper": plans.Plan(Hparams(), source="arXiv:2506.15606, Llama-2-7B"),
}
