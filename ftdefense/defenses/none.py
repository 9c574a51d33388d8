"""SFT alignment: refuse restricted prompts, answer benign ones; no defense.

Stage        alignment.
Template     none
Strategy     none
Minimises    L(alignment): nats per weighted token.
Source       the undefended baseline of every paper here.
Evidence     DESIGN on the sandbox; CODE for the git-disl preset.
Reduces to   nothing simpler: it is the null of the others.
Cost         1 forward, 1 backward.
"""

from flax import struct

from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans


@struct.dataclass
class Hparams(lift.Hparams):
    """Nothing of its own."""


def method(model: types.Model) -> types.Method:
    return lift.supervised(model, "alignment")


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_ALIGNMENT),
        source="DESIGN: sandbox.md, second trial",
    ),
    "code": plans.Plan(
        Hparams(
            optimizers.Optimizer(5e-4, weight_decay=0.1),
            adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
        ),
        batch_size=10,
        epochs=20,
        source="git-disl/Booster 6421918, SFT alignment script",
    ),
}
