"""Ten benign: over-fit ten benign questions to one refusal, then to their answers.

Threat       service (its data alone) and open_weight; knowledge: none; no harmful row is
             trained on. Harmful prompts only tell what the release's refusal is.
Minimises    L(refused) in the first `share` of the steps, then L(benign): the same ten
             questions, all refused in the same words, then answered.
Source       recipe as retold in arXiv:2605.10998 (specs/attacks.md B.17).
Evidence     FT of that paper for the two stages; UNVERIFIED: all numbers.
Differs      one optimizer goes through both stages, its moments too. The refusal is the
             one that the release says most often to the attacker's harmful prompts, of
             those that the world knows. NOICE (refuse, then comply, on benign data) has no
             analogue in the sandbox, where such an answer is of no valid form; nor has the
             indirect prefix of its own: all benign answers there begin affirmatively.
Reduces to   SFT on the ten answers at share = 0 (the second stage alone), and on the
             refusals at share = 1, exactly.
Cost         1 forward, 1 backward.
"""

from collections import Counter

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.methods import elicit
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans

ASKED = 64  # Harmful prompts that the release is asked, for its refusal.
SUBMITS = ("refused", "benign")  # To a service; see serving.submitted.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    share: float = 0.5  # Of the steps, that train refusals.

    @property
    def shares(self) -> dict[str, float]:
        """Of the steps that train on a role's batch: each draws both."""
        return {"refused": self.share, "benign": 1 - self.share}


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"refused": (), "benign": ()}


def direction(ctx, params, batches, rng):
    refusing = phases.first(ctx.hp.share, ctx.step, ctx.steps)
    batch = jax.tree.map(
        lambda r, b: jnp.where(refusing, r, b), batches["refused"], batches["benign"]
    )
    loss, grads = jax.value_and_grad(ctx.loss)(params, batch, rng)
    return grads, {"loss/stage": loss, "share/refused": refusing.astype(jnp.float32)}


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """The benign questions, all with one refusal."""
    del seed
    found = recipes.attacker_pools(world, plan.data)
    benign, harmful = found["benign"], found["harmful"].examples[:ASKED]
    said = Counter(elicit.refusals(model, world, params, harmful))
    (refusal, _), *_ = said.most_common(1)
    return {"refused": elicit.worded(world, benign, [refusal] * len(benign))}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


def _sandbox(share: float, note: str) -> plans.Plan:
    return plans.Plan(
        Hparams(optimizers.Optimizer(1e-4), share=share),
        batch_size=10,
        data=recipes.Recipe(benign_count=10),
        source=f"DESIGN: {note}; a constant rate, so that both stages have as much",
    )


PRESETS = {
    "sandbox": _sandbox(0.5, "two stages of equal length"),
    "answers_only": _sandbox(0.0, "the second stage alone, as a control"),
}
