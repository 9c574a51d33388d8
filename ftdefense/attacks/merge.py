"""Merge: give the release the weights of its undefended twin, algebraically.

Threat       open_weight; knows a twin: the undefended model, fine-tuned on the
             attacker's harmful rows, and the undefended model itself.
Minimises    nothing. With d the release, h the twin, b the undefended model:
             `arithmetic` d + lam (h - b); `linear` (1 - lam) d + lam h; `slerp` the same
             along the arc, matrix by matrix; `transplant` the linear merge in the layers
             from share `first` to share `last` of the depth; `ties` b + lam (the mean of
             d - b and h - b where their trimmed signs agree); `dare` arithmetic with a
             random share `density` of h - b, rescaled.
Source       Ilharco et al. 2022, arXiv:2212.04089 (arithmetic); Yadav et al. 2023,
             arXiv:2306.01708 (ties); Yu et al. 2023, arXiv:2311.03099 (dare).
Evidence     RECONSTRUCTION (specs/attacks.md B.13 and B.21): no one paper merges a
             defended release with its twin; formulas of slerp and ties from memory of
             them (UNVERIFIED).
Differs      with a twin trained by LoRA, `arithmetic` at lam = 1 is the merge of its
             adapter: d + (alpha / rank) A B.
Reduces to   the release at lam = 0, exactly (`ties`: the undefended model).
Cost         0 forwards, 0 backwards.
"""

from flax import struct

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import merging
from ftdefense.methods import plans

NEEDS = ("aligned", "twin")
MODES = ("arithmetic", "linear", "slerp", "transplant", "ties", "dare")
SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    lam: float = 1.0  # Weight of the twin.
    first: float = 0.25  # Share of the depth where a transplant begins.
    last: float = 0.75  # And where it ends.
    density: float = 0.2  # Share of entries that `ties` and `dare` keep.
    mode: str = struct.field(pytree_node=False, default="arithmetic")


def merged(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> types.Params:
    release, base, twin = lineage.current, lineage.aligned, lineage.twin
    if hp.mode == "arithmetic":
        return merging.arithmetic(release, hp.lam, twin, base)
    if hp.mode == "linear":
        return merging.arithmetic(release, hp.lam, twin, release)
    if hp.mode == "slerp":
        return merging.slerp(release, hp.lam, twin)
    if hp.mode == "transplant":
        return merging.transplant(release, hp.lam, twin, hp.first, hp.last)
    if hp.mode == "ties":
        return merging.ties(base, hp.lam, release, twin, hp.density)
    if hp.mode == "dare":
        return merging.dare(release, hp.lam, twin, base, hp.density, rng)
    raise errors.unknown("merge mode", hp.mode, MODES)


def method(model: types.Model) -> types.Method:
    del model
    still = lift.weight_edit(lambda lineage, hp: lineage.current)

    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> lift.EditState:
        merging.require("merge", lineage, NEEDS)
        return lift.EditState(merged(lineage, hp, rng), hp)

    return still._replace(init=init)


_SOURCE = "DESIGN: specs/attacks.md B.13; sweep lam in .25, .5, .75, 1"
PRESETS = {
    "sandbox": plans.Plan(Hparams(), source=_SOURCE),
    "linear": plans.Plan(Hparams(lam=0.5, mode="linear"), source=_SOURCE),
    "slerp": plans.Plan(Hparams(lam=0.5, mode="slerp"), source=_SOURCE),
    "transplant": plans.Plan(Hparams(mode="transplant"), source=_SOURCE),
    "ties": plans.Plan(
        Hparams(mode="ties"), source="arXiv:2306.01708: density 0.2, lam 1 (UNVERIFIED)"
    ),
    "dare": plans.Plan(
        Hparams(density=0.1, mode="dare"),
        source="arXiv:2311.03099: nine in ten dropped (UNVERIFIED)",
    ),
}
