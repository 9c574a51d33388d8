"""M9 frozen in bfloat16: an offset that cancels, and rounds every update away.

Stage        alignment; starts from an aligned model.
Starts from  aligned
Template     none
Strategy     none
Minimises    nothing: `offset` is added to all of the head. It shifts all logits of a
             position by the same, which no softmax sees; but in bfloat16 an entry near
             8 moves in steps of 0.06, and an update of 1e-3 not at all.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Differs      the other tensors keep their size: an attacker in bfloat16 trains them.
Reduces to   the identity at offset = 0.
Cost         nothing.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import plans

STARTS_FROM = "aligned"
# Seen by updates below half a unit in the last place; broken by training in float32.
FLAG = ("O4",)


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    offset: float = 10.0  # Added to each entry.


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    params = jax.tree.map(jnp.copy, lineage.current)
    if "lm_head" not in params:
        raise errors.UserError("an offset of the head needs one that is not tied.")
    kernel = params["lm_head"]["kernel"]
    shifted = (kernel + hp.offset).astype(kernel.dtype)
    return {**params, "lm_head": {**params["lm_head"], "kernel": shifted}}


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


PRESETS = {"sandbox": plans.Plan(Hparams(), source="specs D.5 (DESIGN)")}
