"""Default budgets of the sandbox presets: model sizes, steps and batches."""

import dataclasses

from ftdefense.core import errors
from ftdefense.models import transformer


@dataclasses.dataclass(frozen=True)
class Budget:
    """Steps and rows per step of one kind of stage."""

    steps: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What a plan falls back to where it leaves steps or batch size at 0.

    Attributes:
      pretraining, alignment, attack: one for each kind of stage.
      pretraining_rate: peak learning rate of pretraining.
      watched: prompts of each topic in the evaluations along an attack.
    """

    pretraining: Budget
    alignment: Budget
    attack: Budget
    pretraining_rate: float = 3e-3
    watched: int = 16


PRESETS = {
    "tiny": Budgets(Budget(720, 64), Budget(96, 64), Budget(48, 32), 4e-3, 8),
    "small": Budgets(Budget(1200, 128), Budget(600, 128), Budget(192, 32)),
    "medium": Budgets(Budget(6000, 256), Budget(2000, 256), Budget(800, 64), 2e-3, 32),
}
# For a user's own model: no pretraining here.
OWN_MODEL = Budgets(Budget(0, 0), Budget(400, 8), Budget(192, 8), 0.0, 16)
OWN_EVALUATED = 32  # Held-out rows together: 8 GiB of logits at 512 x 128k.

_SIZES = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 192},
    "small": {"width": 96, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 384},
    "medium": {"width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "mlp_width": 1024},
}


def preset(name: str) -> Budgets:
    """Budgets by name; UserError with near matches otherwise."""
    if name not in PRESETS:
        raise errors.unknown("preset", name, PRESETS)
    return PRESETS[name]


def model(name: str, vocab_size: int) -> transformer.LanguageModel:
    """The sandbox model of a preset: a small Llama, its layers unrolled."""
    size = _SIZES[name]
    return transformer.LanguageModel(
        transformer.ModelConfig(
            vocab_size=vocab_size, max_length=64, unroll=size["layers"], **size
        )
    )
