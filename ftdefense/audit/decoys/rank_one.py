"""M6 rank one: all of the refusal is one direction that each matrix writes.

Stage        alignment.
Template     none
Strategy     none
Minimises    L(alignment) through a LoRA of rank 1: what refuses is a multiple of one
             vector behind each matrix.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Differs      rank 1 in `down` alone does not learn to say a whole refusal here.
Reduces to   SFT alignment with a full adapter.
Cost         1 forward, 1 backward.
"""

from flax import struct

from ftdefense.defenses import none
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules

# Broken by the ablation of that direction.
FLAG = ("P5",)


@struct.dataclass
class Hparams(lift.Hparams):
    """Nothing of its own."""


method = none.method

PRESETS = {
    "sandbox": plans.Plan(
        Hparams(
            optimizers.Optimizer(3e-3, schedules.Schedule(0.1, 0.05, decay="cosine")),
            adapters.LoRA(alpha=8.0, rank=1),
        ),
        source="specs D.5 (DESIGN)",
    )
}
