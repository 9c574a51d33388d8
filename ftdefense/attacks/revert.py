"""Revert: undo alignment with the public weights from before it.

Threat       open_weight; knows the published pretrained model, and for `arithmetic`
             the undefended aligned one.
Minimises    nothing. With d the release, p the pretrained and a the aligned weights:
             `arithmetic` d + lam (p - a); `linear` (1 - lam) d + lam p or, with
             `toward=aligned`, lam a: the merge with the original weights.
Source       Ilharco et al. 2022, arXiv:2212.04089: a negated task vector.
Evidence     DESIGN (specs/attacks.md D.6, T4; B.13).
Reduces to   the release at lam = 0, exactly.
Cost         0 forwards, 0 backwards.
"""

from flax import struct

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import merging
from ftdefense.methods import plans

NEEDS = ("aligned", "pretrained")
MODES, ENDS = ("arithmetic", "linear"), ("pretrained", "aligned")
SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    lam: float = 1.0  # How far.
    mode: str = struct.field(pytree_node=False, default="arithmetic")
    toward: str = struct.field(pytree_node=False, default="pretrained")  # Of `linear`.


def edit(lineage: types.Lineage, hp: Hparams) -> types.Params:
    merging.require("revert", lineage, NEEDS)
    if hp.mode not in MODES:
        raise errors.unknown("revert mode", hp.mode, MODES)
    if hp.toward not in ENDS:
        raise errors.unknown("revert toward", hp.toward, ENDS)
    release, end, origin = lineage.current, lineage.pretrained, lineage.aligned
    if hp.mode == "linear":
        end, origin = getattr(lineage, hp.toward), release
    return merging.arithmetic(release, hp.lam, end, origin)


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(edit)


_SOURCE = "DESIGN: specs/attacks.md D.6; sweep lam in .25, .5, .75, 1"
PRESETS = {
    "sandbox": plans.Plan(Hparams(), source=_SOURCE),
    "linear": plans.Plan(Hparams(lam=0.5, mode="linear"), source=_SOURCE),
    "original": plans.Plan(
        Hparams(lam=0.5, mode="linear", toward="aligned"), source=_SOURCE
    ),
}
