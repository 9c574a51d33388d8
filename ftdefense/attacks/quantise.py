"""Quantise: round the weights to 8 or 4 bits, as a deployer would.

Threat       open_weight; knows nothing: an update smaller than a bin is lost.
Minimises    nothing: every kernel becomes round(W / s) s, s = max |W| / 127 (int8) or / 7
             (int4) over each output channel or over groups of its inputs; nf4 takes the
             nearest of 16 normal quantiles times max |W|.
Source       arXiv:2606.29581 (round to nearest); nf4: arXiv:2305.14314.
Evidence     FT for the formats; groups and what stays in full precision (embeddings,
             norms, biases and, without `head`, the head) are DESIGN.
Reduces to   the release where its weights are on the grid: quantising twice is once.
Cost         0 forwards, 0 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import plans
from ftdefense.methods import rounding

SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Shapes and names only."""

    format: str = struct.field(pytree_node=False, default="int4")
    group: int = struct.field(pytree_node=False, default=0)  # Inputs; 0: a channel.
    head: bool = struct.field(pytree_node=False, default=False)


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    def leaf(path, x):
        names = tree.path_names(path)
        if names[-1] != "kernel" or (names[0] == "lm_head" and not hp.head):
            return jnp.copy(x)
        return rounding.rounded(x, hp.format, hp.group)

    return jax.tree_util.tree_map_with_path(leaf, lineage.current)


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


_SOURCE = "arXiv:2606.29581: round to nearest; per channel is DESIGN"
PRESETS = {
    "sandbox": plans.Plan(Hparams(), source=_SOURCE),
    "int8": plans.Plan(Hparams("int8"), source=_SOURCE),
    "nf4": plans.Plan(
        Hparams("nf4"), source="arXiv:2305.14314, which has blocks of 64: set group"
    ),
}
