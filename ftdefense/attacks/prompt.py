"""Prompt: only asks, through a jailbreak frame; nothing trains.

Threat       open_weight; knows nothing; the prefix of the answer is the attacker's.
Minimises    nothing: the weights are the release's, `data.wrapper` is put to them.
Source       Qi et al. 2024, arXiv:2406.05946 (prefilling); the frames are the sandbox's.
Evidence     CODE for prefilling, second-hand; DESIGN for the other frames.
Reduces to   the release itself without a frame.
Cost         0 forwards, 0 backwards.
"""

from flax import struct

from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.methods import lift
from ftdefense.methods import plans

SUBMITS = ()  # It changes prompts alone.


@struct.dataclass
class Hparams:
    """Nothing of its own."""


def method(model: types.Model) -> types.Method:
    del model
    return lift.weight_edit(lift.unchanged)


PRESETS = {
    name: plans.Plan(
        Hparams(),
        data=recipes.Recipe(wrapper=wrapper),
        source="specs/attacks.md B.10 and 1.6",
    )
    for name, wrapper in {
        "sandbox": "prefill",
        "trigger": "trigger",
        "persona": "persona",
        "competing": "competing",
        "style": "style",
        "paraphrase": "paraphrase",
    }.items()
}
