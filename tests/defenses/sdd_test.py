"""SDD: plain fine-tuning on rows that the data recipe has mispaired.

Mutants:
  `lift.supervised(model, "unrelated")` -> `lift.supervised(model, "harmful")`
  `lift.supervised(model, "unrelated")` -> `lift.supervised(model, "alignment")`
  `STARTS_FROM = "aligned"` -> `STARTS_FROM = "pretrained"`
"""

import jax

from ftdefense.core import types
from ftdefense.defenses import sdd
from ftdefense.methods import lift
from ftdefense.methods import optimizers

from ..conftest import batch
from . import common


def test_is_sft_on_the_unrelated_rows():
    """Exactly. Catches a batch of another role."""
    method = sdd.method(common.MODEL)
    hp = sdd.Hparams(optimizers.Optimizer(1e-3).tabulate(2))
    assert dict(method.streams(hp)) == {"unrelated": ()}
    origin = types.Lineage(common.params())
    state = method.init(origin, hp, common.KEY)
    after, _ = jax.jit(method.step)(state, origin, {"unrelated": batch(1)}, common.KEY)
    expected, _ = jax.jit(lift.descend)(state, common.sft_gradient(batch(1)))
    common.close(after.params, expected.params)


def test_starts_from_an_aligned_model():
    """Catches SDD as the alignment itself: it degrades what is aligned already."""
    assert sdd.STARTS_FROM == "aligned"
