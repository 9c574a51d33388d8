"""LEAKY: a control that returns the aligned model unchanged.

Stage        alignment.
Starts from  aligned
Template     none
Strategy     none
Minimises    nothing.
Source       DESIGN: specs/attacks.md 1.6; every metric must agree with `none`.
Evidence     DESIGN
Reduces to   the identity, always.
Cost         nothing.
"""

from flax import struct

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import plans

STARTS_FROM = "aligned"


@struct.dataclass
class Hparams:
    """Nothing to set."""


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(lift.unchanged)


PRESETS = {"sandbox": plans.Plan(Hparams(), source="DESIGN")}
