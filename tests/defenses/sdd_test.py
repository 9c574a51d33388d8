"""SDD: plain fine-tuning on rows that the data recipe has mispaired.

Mutants:
  `"unrelated_refused" if hp` -> `"unrelated_refused" if not hp`
  `else "unrelated": ()` -> `else "alignment": ()`
  `return grads, {` -> `return ctx.lineage.current, {`
  `STARTS_FROM = "aligned"` -> `STARTS_FROM = "pretrained"`
"""

import jax
import pytest

from ftdefense.core import types
from ftdefense.defenses import sdd
from ftdefense.methods import lift
from ftdefense.methods import optimizers

from ..conftest import batch
from . import common


@pytest.mark.parametrize(
    ("refuse_first", "role"), [(False, "unrelated"), (True, "unrelated_refused")]
)
def test_is_sft_on_the_unrelated_rows(refuse_first, role):
    """Exactly. Catches a batch of another role."""
    method = sdd.method(common.MODEL)
    optimizer = optimizers.Optimizer(1e-3).tabulate(2)
    hp = sdd.Hparams(optimizer, refuse_first=refuse_first)
    assert dict(method.streams(hp)) == {role: ()}
    origin = types.Lineage(common.params())
    state = method.init(origin, hp, common.KEY)
    after, _ = jax.jit(method.step)(state, origin, {role: batch(1)}, common.KEY)
    expected, _ = jax.jit(lift.descend)(state, common.sft_gradient(batch(1)))
    common.close(after.params, expected.params)


def test_starts_from_an_aligned_model():
    """Catches SDD as the alignment itself: it degrades what is aligned already."""
    assert sdd.STARTS_FROM == "aligned"
