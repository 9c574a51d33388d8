"""M4 coupled trap: harmful descent is turned against capability, and nothing else.

Stage        alignment; starts from an aligned model.
Starts from  aligned
Template     T4 coupling
Strategy     self-destruct
Minimises    L(alignment) + beta * cos(g_h, g_b) of the gradients of L(harmful) and
             L(benign), by finite differences (`objectives.coupling`). An attacker who
             asks for both losses at once walks around it.
Source       specs D.5 (DESIGN); its two-dimensional form is A-u3.
Evidence     DESIGN
Reduces to   SFT on the alignment rows at beta = 0.
Cost         5 forwards, 5 backwards.
"""

from flax import struct
import jax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import coupling

STARTS_FROM = "aligned"
# Seen by the cosine of the gradients; broken by SideStepper.
FLAG = ("G4", "U1")


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    beta: float = 0.3  # Weight of the cosine.
    epsilon: float = 1e-3  # Of the finite difference, L2.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"alignment": (), "harmful": (), "benign": ()}


def direction(ctx, params, batches, rng):
    rng_align, rng_harm, rng_use = jax.random.split(rng, 3)
    wide = tree.wide(params)
    loss, grads = jax.value_and_grad(ctx.loss)(wide, batches["alignment"], rng_align)
    coupled = coupling.of_gradients(
        lambda w: ctx.loss(w, batches["harmful"], rng_harm),
        lambda w: ctx.loss(w, batches["benign"], rng_use),
        wide,
        ctx.hp.epsilon,
    )
    grads = tree.add_scale(grads, ctx.hp.beta, coupled.grad)
    return grads, {"loss/alignment": loss, "cosine/harmful_benign": coupled.cosine}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(Hparams(optimizers.SANDBOX), source="specs D.5 (DESIGN)")
}
