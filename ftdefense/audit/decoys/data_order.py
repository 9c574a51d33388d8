"""M10 data-order luck: an alignment of a few long steps, whose end is a matter of seed.

Stage        alignment.
Template     none
Strategy     none
Minimises    L(alignment), in few steps of a high rate on small batches.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Reduces to   SFT alignment at its usual plan.
Cost         1 forward, 1 backward.
"""

from flax import struct

from ftdefense.defenses import none
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

# Seen by the spread over seeds.
FLAG = ("R1",)


@struct.dataclass
class Hparams(lift.Hparams):
    """Nothing of its own."""


method = none.method

PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.Optimizer(1e-3)),
        batch_size=32,
        steps=60,
        source="specs D.5 (DESIGN)",
    )
}
