"""Safe LoRA: keep of the user's update what lies where alignment moved the weights.

Stage        post_fine_tuning; a weight edit, without training.
Template     none
Strategy     anchoring
Minimises    nothing: with V = W_aligned - W_pretrained, C = V V' / ||V||_F and D the
             user's update of W (rows are outputs), D becomes C D in the matrices where
             cos(C D, D), rounded to 5 decimals, is at most a threshold: `threshold`
             itself, or the `count`-th smallest cosine.
Source       Hsu et al. 2024, arXiv:2405.16833; code read at IBM/SafeLoRA d81fda1
             (specs: defenses_unlearning_and_traps 12.1).
Evidence     CODE. C is no projector: it also scales, by up to sigma_1^2 / ||V||_F.
Licence      no licence file found; rewritten from the formulas.
Differs      an adapter is merged already: D = W_tuned - W_aligned stands for its B A,
             scale included, which changes no cosine, and C D for (C B) A. So it works on
             fine-tuning of all parameters as well, which the code does not: there
             embeddings, head, norms and biases stay the user's. Matrices that the user
             or alignment did not move are no candidates.
Reduces to   the user's model at count = 0, or at threshold < 0, exactly.
Cost         two products of matrices per matrix.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import edits
from ftdefense.methods import lift
from ftdefense.methods import plans

NEEDS = ("aligned", "pretrained")
# Cosines are compared in whole units of 1e-5: as fractions, equal ones would differ in
# their last bit. A threshold is rounded down, but not by what float32 lacks of it.
_UNITS = 1e5
_ROUNDING = 0.02
SELECTIONS = ("count", "threshold")


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    count: int = 10  # Matrices that are projected, ties included.
    threshold: float = 0.5  # Cosine up to which a matrix is projected.
    select: str = struct.field(pytree_node=False, default="count")
    targets: tuple[str, ...] = struct.field(
        pytree_node=False, default=adapters.PROJECTIONS
    )


def project(update_IxO, alignment_IxO) -> tuple[jax.Array, jax.Array]:
    """(D C, cos(D C, D)), C = V V' / ||V|| symmetric; the cosine is inf if undefined.

    Kernels are [inputs, outputs]: the transposes of D and V in the paper.
    """
    length = tree.norm(alignment_IxO)
    if update_IxO.shape[0] < update_IxO.shape[1]:  # Then C, [O, O], is the larger.
        moved_IxO = (update_IxO @ alignment_IxO.T) @ alignment_IxO
    else:
        moved_IxO = update_IxO @ (alignment_IxO.T @ alignment_IxO)
    moved_IxO /= jnp.where(length > 0, length, 1)
    defined = (length > 0) & (tree.norm(update_IxO) > 0)
    units = jnp.round(_UNITS * tree.cosine(moved_IxO, update_IxO))
    return moved_IxO, jnp.where(defined, units, jnp.inf)


def limit(cosines_M: jax.Array, hp: Hparams) -> jax.Array:
    """The cosine up to which a matrix is projected, in units of 1e-5."""
    if hp.select == "threshold":
        return jnp.floor(_UNITS * jnp.asarray(hp.threshold) + _ROUNDING)
    count = jnp.asarray(hp.count).astype(jnp.int32)
    last = jnp.clip(count, 1, cosines_M.size) - 1
    return jnp.where(count > 0, jnp.sort(cosines_M)[last], -jnp.inf)


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    """Projects the chosen matrices; all others keep the user's bits."""
    edits.require("safe_lora", lineage, NEEDS)
    if hp.select not in SELECTIONS:
        raise errors.unknown("safe_lora select", hp.select, SELECTIONS)
    origin = (lineage.current, lineage.aligned, lineage.pretrained)
    tuned, aligned, pretrained = (edits.kernels(w, hp.targets) for w in origin)
    moved, cosines = {}, {}
    for path, kernel_NxIxO in tuned.items():
        update_NxIxO = edits.difference(kernel_NxIxO, aligned[path])
        alignment_NxIxO = edits.difference(aligned[path], pretrained[path])
        pairs = update_NxIxO, alignment_NxIxO
        with jax.default_matmul_precision("highest"):  # Cosines count to 5 decimals.
            moved[path], cosines[path] = jax.lax.map(lambda x: project(*x), pairs)
    most = limit(jnp.concatenate(list(cosines.values())), hp)
    edited = {}
    for path, cosines_N in cosines.items():
        chosen_N = (cosines_N <= most) & jnp.isfinite(cosines_N)
        projected_NxIxO = tree.add_scale(aligned[path], 1.0, moved[path])
        edited[path] = jnp.where(chosen_N[:, None, None], projected_NxIxO, tuned[path])
    return edits.replace(lineage.current, edited)


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(count=1)),
    "code": plans.Plan(Hparams(), source="IBM/SafeLoRA d81fda1, config.py"),
}
