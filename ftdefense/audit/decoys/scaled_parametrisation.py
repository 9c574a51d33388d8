"""M1 scaled parametrisation: large weights, on which steps of normal length do little.

Stage        alignment; starts from an aligned model.
Starts from  aligned
Template     none
Strategy     none
Minimises    nothing: every kernel, the embedding and the head are multiplied by `scale`,
             the norms before them divided by it. The residual stream grows with them,
             which the norms divide out: the function stays, its gradient shrinks.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Differs      the gradient of the norms' own scales grows instead.
Reduces to   the identity at scale = 1.
Cost         nothing.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import plans

STARTS_FROM = "aligned"
# Seen by gradients that are too small, and by attacks on weights that are scaled back;
# broken by learning rates `scale` times as large.
FLAG = ("G1", "O1", "R4")


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    scale: float = 16.0  # A power of two loses no digit.


def rescaled(params: types.Params, scale: float | jax.Array) -> types.Params:
    """The same function with weights `scale` times as large.

    Raises:
      UserError: for a model without norms before its kernels.
    """
    if "final_norm" not in params:
        raise errors.UserError("a scaled parametrisation needs a model with norms.")

    def leaf(path, x):
        *_, module, kind = tree.path_names(path)
        if kind == "bias":  # Biases are added behind the kernel: o's to the stream.
            return x * scale if module == "o" else jnp.copy(x)
        if kind == "scale":  # Norms of heads are inside of the attention.
            return jnp.copy(x) if module in ("q_norm", "k_norm") else x / scale
        return x * scale

    scaled = jax.tree_util.tree_map_with_path(leaf, params)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), scaled, params)


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    return rescaled(lineage.current, hp.scale)


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


PRESETS = {"sandbox": plans.Plan(Hparams(), source="specs D.5 (DESIGN)")}
