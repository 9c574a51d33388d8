"""M3 saturated logits: an answer 50 times as sure, on which gradients say little.

Stage        alignment; starts from an aligned model.
Starts from  aligned
Template     none
Strategy     none
Minimises    nothing: the head (of a tied one the last norm) is multiplied by `factor`.
             Greedy answers stay; where the model is sure the gradient is 0, elsewhere
             it is `factor` times as long.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Reduces to   the identity at factor = 1.
Cost         nothing.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import plans

STARTS_FROM = "aligned"
# Seen by the norm of gradients; broken by training with the head scaled back.
FLAG = ("G1", "G2", "O1", "O2", "U1")


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    factor: float = 50.0  # Of the logits.


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    params = jax.tree.map(jnp.copy, lineage.current)
    name = "lm_head" if "lm_head" in params else "final_norm"
    sure = jax.tree.map(lambda x: (x * hp.factor).astype(x.dtype), params[name])
    return {**params, name: sure}


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


PRESETS = {"sandbox": plans.Plan(Hparams(), source="specs D.5 (DESIGN)")}
