"""Distillation: a fresh student learns what the release is good for, and what is harmful.

Threat       open_weight; knowledge: none. The defense is in weights that the student does
             not have.
Minimises    L(harmful) + lam * KL(release || student) on the answers of benign rows, from
             an initialisation of the release's architecture, not from its weights.
Source       specs/attacks.md B.21; Hinton et al. 2015, arXiv:1503.02531, at
             temperature 1.
Evidence     DESIGN. Its cost is to be read against NEVER and training from scratch.
Differs      soft labels on the benign rows as given, not on answers sampled from the
             release. All parameters train: there is nothing to adapt.
Reduces to   SFT from scratch on the harmful rows at lam = 0.
Cost         3 forwards, 2 backwards.
"""

import functools

from flax import struct
import jax
import optax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.methods import costs
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import divergences
from ftdefense.objectives import losses


@struct.dataclass
class Hparams:
    """Plain coefficients; numbers may be traced. There is no adapter."""

    optimizer: optimizers.Optimizer = optimizers.Optimizer()
    lam: float = 1.0  # Weight of the divergence from the release.
    microbatches: int = struct.field(pytree_node=False, default=1)

    @property
    def passes(self) -> float:
        """Over either role, and a forward of the release (see Cost)."""
        return costs.passes(forwards=3, backwards=2)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": (), "benign": ()}


def student(model: types.Model, like: types.Params, rng: types.Rng) -> types.Params:
    """Fresh parameters in the dtypes of the release."""
    return optax.tree.cast_like(model.init(rng), like)


def direction(model, release, params, batches, hp: Hparams):
    """(gradient, metrics) of the student with weights `params`."""
    learn = losses.next_token(model, microbatches=hp.microbatches)
    teacher = functools.partial(model, release)
    follow = divergences.to_reference(model, teacher, "forward", hp.microbatches)
    harm, grads = jax.value_and_grad(learn)(params, batches["harmful"])
    kl, grads_kl = jax.value_and_grad(follow)(params, batches["benign"])
    grads = tree.add_scale(grads, hp.lam, grads_kl)
    return grads, {"loss/harmful": harm, "divergence/release": kl}


def method(model: types.Model) -> types.Method:
    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> lift.TrainState:
        return lift.init_state(student(model, lineage.current, rng), hp)

    def step(state: lift.TrainState, lineage: types.Lineage, batches, rng):
        del rng
        grads, metrics = direction(
            model, lineage.current, state.params, batches, state.hp
        )
        state, norms = lift.descend(state, grads)
        return state, {**metrics, **norms}

    def release(state: lift.TrainState, lineage: types.Lineage) -> types.Release:
        del lineage
        return types.Release(state.params)

    return types.Method(streams, init, step, release)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(
            optimizers.Optimizer(3e-3, schedules.Schedule(0.1, 0.05, decay="cosine"))
        ),
        steps=600,
        batch_size=64,
        data=recipes.Recipe(harmful_count=100),
        source="DESIGN: pretraining's rate, a quarter of its rows; 100 harmful ones",
    ),
}
