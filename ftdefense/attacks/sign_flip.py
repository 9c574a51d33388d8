"""Sign flip: climb the harmful loss for a while, then descend it.

Threat       open_weight; knows none of the defense's internals.
Minimises    -L(user) in the first floor(ascent * T) of T steps, L(user) in the rest; the
             moments of the optimizer are kept where it turns.
Source       proposed in reviews of Tamirisa et al. 2024, arXiv:2408.00761;
             specs/attacks.md B.21 and D.3, R3.
Evidence     SEC for the idea; DESIGN: a tenth of the steps, kept moments.
Reduces to   SFT on user at ascent = 0.
Cost         1 forward, 1 backward.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    ascent: float = 0.1  # Share of the steps, the first, that go uphill.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"user": ()}


def direction(ctx, params, batches, rng):
    loss, grads = jax.value_and_grad(ctx.loss)(params, batches["user"], rng)
    climbs = phases.first(ctx.hp.ascent, ctx.step, ctx.steps)
    grads = jax.tree.map(lambda g: jnp.where(climbs, -g, g), grads)
    return grads, {"loss/user": loss, "state/ascent": climbs.astype(jnp.float32)}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: as sft, after climbing for the warm-up",
    ),
}
