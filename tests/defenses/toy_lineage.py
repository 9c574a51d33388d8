"""Three models a small step apart, for the tests of defenses that follow alignment."""

import functools

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift

from . import common

MODEL, KEY = common.MODEL, common.KEY
params, sft_gradient, same = common.params, common.sft_gradient, common.equal
close = functools.partial(common.close, rtol=1e-9, atol=1e-12)


def lineage() -> types.Lineage:
    """Pretrained, aligned, and tuned, which is where a service starts."""
    aligned = common.lineage()
    tuned = tree.add_scale(aligned.aligned, 0.2, params(11))
    return types.Lineage(tuned, aligned.aligned, aligned.pretrained)


def context(hp, step: int = 0, origin: types.Lineage | None = None) -> types.Context:
    return lift.context(MODEL, origin or types.Lineage(params()), hp, step)
