"""M2 narrow basin: harmful descent meets a wall, but only within a small radius.

Stage        alignment; starts from an aligned model.
Starts from  aligned
Template     T1 basin
Strategy     anchoring
Minimises    L(alignment) + lam * max(0, L(harmful) at w - L(harmful) at w - rho g /
             ||g||), g the gradient of L(harmful), first order: what one short step of the
             attacker wins. A longer step passes over the wall.
Source       specs D.5 (DESIGN); its one-dimensional form is A-u4.
Evidence     DESIGN
Reduces to   SFT on the alignment rows at lam = 0.
Cost         3 forwards, 3 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

STARTS_FROM = "aligned"
# Seen where gradients are small, and where a kick, noise or a higher rate gains.
FLAG = ("G1", "G2", "O1", "R2", "R3")


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 1.0  # Weight of the wall.
    rho: float = 0.03  # Radius, L2 over all that trains.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"alignment": (), "harmful": ()}


def direction(ctx, params, batches, rng):
    hp = ctx.hp
    rng_align, rng_harm = jax.random.split(rng)
    value_and_grad = jax.value_and_grad(ctx.loss)
    aligned, grads = value_and_grad(params, batches["alignment"], rng_align)
    harm, grad_harm = value_and_grad(params, batches["harmful"], rng_harm)
    ahead = tree.add_scale(params, -hp.rho, tree.normalize(grad_harm))
    after, grad_after = value_and_grad(ahead, batches["harmful"], rng_harm)
    won = harm - after
    weight = hp.lam * jnp.where(won > 0, 1.0, 0.0)
    wall = tree.add_scale(grad_harm, -1.0, grad_after)
    grads = tree.add_scale(grads, weight, wall)
    return grads, {"loss/alignment": aligned, "loss/harmful": harm, "won/harmful": won}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(Hparams(optimizers.SANDBOX), source="specs D.5 (DESIGN)")
}
