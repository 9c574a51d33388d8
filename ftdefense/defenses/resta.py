"""RESTA: add the vector from a harmfully fine-tuned model back to the aligned one.

Stage        post_fine_tuning; a short harmful fine-tuning finds the vector to add.
Template     none
Strategy     anchoring
Minimises    L(harmful; w) from w_aligned, which gives w_unaligned; releases
             w_aligned + DARE(w_user - w_aligned) + gamma * (w_aligned - w_unaligned).
             DARE drops each entry with probability `drop`, and divides the rest by
             1 - drop.
Source       Bhardwaj et al. 2024, arXiv:2402.11746; the code was not readable (specs:
             defenses_unlearning_and_traps 12.3).
Evidence     the abstract and notes for the rule. UNVERIFIED: gamma = 0.5, drop = 0.3, and
             how long the harmful fine-tuning is.
Licence      code not seen; rewritten from the formulas.
Differs      `drop` = 0, the default, is RESTA; above, RESTA_d. What the fine-tuning
             started from is the aligned release. Norms and biases count as entries.
Reduces to   the user's model at gamma = 0 and drop = 0, exactly.
Cost         1 forward, 1 backward, on the provider's harmful rows.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import draws
from ftdefense.core import types
from ftdefense.methods import edits
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

NEEDS = ("aligned",)


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    gamma: float = 0.5  # Multiple of the safety vector that is added.
    drop: float = 0.0  # Probability that an entry of the user's update is dropped.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": ()}


def direction(ctx, params, batches, rng, seed):
    loss, grads = jax.value_and_grad(ctx.loss)(params, batches["harmful"], rng)
    return grads, {"loss/harmful": loss}, seed


def memory(ctx, params, rng):
    """What DARE draws with, as numbers: `release` has no key of its own."""
    del ctx, params
    return jax.random.key_data(rng)


def dropped(update: types.Params, drop, rng: types.Rng) -> types.Params:
    """DARE: each entry is zero with probability `drop`; the mean stays."""
    leaves, structure = jax.tree.flatten(update)
    rngs = jax.random.split(rng, len(leaves))

    def thinned(x, rng):
        kept = draws.uniform(rng, x.shape) >= drop
        return jnp.where(kept, x / (1 - drop), 0)

    return structure.unflatten(map(thinned, leaves, rngs))


def restored(lineage: types.Lineage, unaligned, hp: Hparams, rng: types.Rng):
    """The user's weights with the thinned update and the safety vector."""
    update = jax.tree.map(edits.difference, lineage.current, lineage.aligned)
    safety = jax.tree.map(edits.difference, lineage.aligned, unaligned)

    def add(user, whole, thin, vector):
        # What DARE changes, so that nothing is rounded where it changes nothing.
        moved = user.astype(whole.dtype) + (thin - whole) + hp.gamma * vector
        return moved.astype(user.dtype)

    thin = dropped(update, hp.drop, rng)
    return jax.tree.map(add, lineage.current, update, thin, safety)


def method(model: types.Model) -> types.Method:
    harmful = lift.remembering_method(model, direction, streams, memory)

    def start(lineage: types.Lineage) -> types.Lineage:
        """The harmful fine-tuning starts where the user's did."""
        edits.require("resta", lineage, NEEDS)
        return types.Lineage(lineage.aligned)

    def init(lineage, hp, rng):
        return harmful.init(start(lineage), hp, rng)

    def step(state, lineage, batches, rng):
        return harmful.step(state, start(lineage), batches, rng)

    def release(state: lift.TrainState, lineage: types.Lineage) -> types.Release:
        unaligned = harmful.release(state, start(lineage)).params
        rng = jax.random.wrap_key_data(state.memory)
        return types.Release(restored(lineage, unaligned, state.hp, rng))

    return types.Method(streams, init, step, release)


_SANDBOX = Hparams(optimizers.SANDBOX_TUNING)

PRESETS = {
    "sandbox": plans.sandbox(_SANDBOX.replace(gamma=0.05)),
    "paper": plans.Plan(
        _SANDBOX.replace(drop=0.3),
        source="arXiv:2402.11746, RESTA_d; UNVERIFIED, its fine-tuning the sandbox's",
    ),
}
