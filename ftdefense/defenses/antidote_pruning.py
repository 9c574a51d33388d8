"""Antidote: remove from the user's update what matters most on harmful rows.

Stage        post_fine_tuning; one-shot pruning, without a gradient.
Template     none
Strategy     anchoring
Minimises    nothing: with D the user's update of W (rows are outputs) and s_j the mean
             over harmful samples of the sum over their tokens of the squared input j,
             each row of D loses its entries of highest |D_ij| * sqrt(s_j): all but
             int((1 - alpha) * inputs) of them. The inputs are the user's model's.
Source       Huang et al. 2024, arXiv:2408.09600; code read at git-disl/Antidote 26e2ade
             (specs: defenses_unlearning_and_traps 12.2); the score is Wanda's.
Evidence     CODE for the rule and alpha; the defaults of the paper are UNVERIFIED.
Licence      no licence file found; rewritten from the formulas.
Differs      an adapter is merged already: where the code prunes the factors A and B, each
             by its own inputs (`prune_factors`), `prune` = "update" prunes
             D = W_tuned - W_aligned.
             `prune` = "weights" prunes W itself, as the code does after fine-tuning of
             all parameters (there with `targets` q, k, v). Ties go to the later input.
             Padding, which the code avoids by batches of one, is left out.
Reduces to   the user's model at alpha = 0, exactly; at alpha = 1 the targets are the
             aligned model's, exactly.
Cost         1 forward, and one sort per matrix.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import edits
from ftdefense.methods import plans

NEEDS = ("aligned",)
PRUNED = ("update", "weights")
# Shares of inputs are counted in float32: 0.9 * 10 must not round below 9.
_ROUNDING = 1e-6


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    alpha: float = 0.1  # Share of the entries of each row that is removed.
    prune: str = struct.field(pytree_node=False, default="update")
    targets: tuple[str, ...] = struct.field(
        pytree_node=False, default=adapters.PROJECTIONS
    )


@struct.dataclass
class State:
    """What calibration has summed up, in `params`: {path of a kernel: [N, I]}."""

    params: dict[edits.Path, jax.Array]
    hp: Hparams


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.prune not in PRUNED:
        raise errors.unknown("antidote_pruning prune", hp.prune, PRUNED)
    return {"harmful": ()}


def present(weights_BxL: jax.Array) -> jax.Array:
    """Which tokens are no padding: those with a weighted one at or after them."""
    later_BxL = jnp.cumsum(jnp.flip(weights_BxL > 0, -1), -1)
    return jnp.flip(later_BxL, -1) > 0


def squares(
    inputs: types.Params, present_BxL: jax.Array
) -> dict[edits.Path, jax.Array]:
    """Sums of squared inputs over the tokens that are present, [N, I] by path."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(inputs):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        kept = jnp.where(present_BxL[..., None], jnp.square(wide), 0)
        found[*tree.path_names(path)[:-1], "kernel"] = jnp.sum(kept, (-3, -2))
    return found


def highest(scores_IxO: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """The share `alpha` of the inputs with the highest scores, for each output."""
    width_in = scores_IxO.shape[0]
    spared = jnp.floor(width_in * (1 - alpha + _ROUNDING))
    ranks_IxO = jnp.argsort(jnp.argsort(scores_IxO, axis=0), axis=0)
    return ranks_IxO >= spared


def prune_factors(
    a_IxR: jax.Array, b_RxO: jax.Array, x_TxI: jax.Array, alpha: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The code's form for an adapter: A pruned by its inputs x, B by x A of all of A.

    Rows of x are the calibration tokens; ranks are those of sums as of means.
    """

    def pruned(kernel_IxO, inputs_TxI):
        norms_I = jnp.sqrt(jnp.sum(jnp.square(tree.wide(inputs_TxI)), 0))
        scores_IxO = jnp.abs(tree.wide(kernel_IxO)) * norms_I[:, None]
        return jnp.where(highest(scores_IxO, alpha), 0, kernel_IxO)

    return pruned(a_IxR, x_TxI), pruned(b_RxO, x_TxI @ a_IxR)


def method(model: types.Model) -> types.Method:
    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> State:
        del rng
        edits.require("antidote_pruning", lineage, NEEDS)
        chosen = edits.kernels(lineage.current, hp.targets)
        zeros = {
            path: jnp.zeros(x.shape[:2], jnp.promote_types(x.dtype, jnp.float32))
            for path, x in chosen.items()
        }
        return State(zeros, hp)

    def step(state: State, lineage: types.Lineage, batches, rng: types.Rng):
        del rng
        batch = batches["harmful"]
        present_BxL = present(batch.weights)
        found = squares(model.inputs(lineage.current, batch.tokens), present_BxL)
        sums = {path: x + found[path] for path, x in state.params.items()}
        tokens = jnp.sum(present_BxL, dtype=jnp.float32)
        return state.replace(params=sums), {"tokens/harmful": tokens}

    def release(state: State, lineage: types.Lineage) -> types.Release:
        hp, pruned = state.hp, {}
        tuned = edits.kernels(lineage.current, hp.targets)
        aligned = edits.kernels(lineage.aligned, hp.targets)
        for path, sums_NxI in state.params.items():
            rest = aligned[path]
            if hp.prune == "weights":
                rest = jnp.zeros_like(rest)
            size_NxIxO = jnp.abs(edits.difference(tuned[path], rest))
            scores_NxIxO = size_NxIxO * jnp.sqrt(sums_NxI)[..., None]
            removed = jax.lax.map(lambda x: highest(x, hp.alpha), scores_NxIxO)
            pruned[path] = jnp.where(removed, rest, tuned[path])
        return types.Release(edits.replace(lineage.current, pruned))

    return types.Method(streams, init, step, release)


def _code(alpha: float, note: str) -> plans.Plan:
    source = f"git-disl/Antidote 26e2ade, {note}"
    return plans.Plan(Hparams(alpha=alpha), batch_size=10, epochs=1, source=source)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(alpha=0.01), epochs=1, source="DESIGN: BUILD_NOTES.md, Sandbox presets"
    ),
    "code": _code(
        0.1,
        "SST2. The code prunes factors, by |A| ||x|| and |B| ||A x||; this the merged "
        "update",
    ),
    "code_gsm8k": _code(0.05, "GSM8K and AGNEWS"),
    "code_wiki": _code(0.01, "importance from wiki text"),
    "code_full": plans.Plan(
        Hparams(prune="weights", targets=adapters.ATTENTION),
        batch_size=10,
        epochs=1,
        source="git-disl/Antidote 26e2ade after full fine-tuning: q, k and v, exactly; "
        "alpha as on SST2",
    ),
}
