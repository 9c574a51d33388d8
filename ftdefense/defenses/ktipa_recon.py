"""KT-IPA (reconstruction): a random-hash purge, then a utility that outlasts an attack.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T2 purge + T3 look-ahead
Strategy     anchoring
Minimises    in the first `mapping_share` of the steps mean over layers and positions of
             (1 - |cos(h_l[t], R[id_t])|) on the adversary's harmful rows + CE(retain),
             R ~ N(0, 1)^(V x D) frozen; then what `ktipa_noh` minimises, U(w) +
             gamma * U(w') + lam_retain * CE(retain; w), with the purged model as the
             reference of KTO.
Source       Cheng et al. 2025, COLING, 2025.coling-main.687 (specs: artifacts TASK 2);
             KTO: limberc/KT-IPA b43d9aa; purge: rishub-tamirisa/tamper-resistance
             19de233.
Evidence     CODE for KTO, and for the purge as TAR's; that it is KT-IPA's is inferred.
             RECONSTRUCTION for the attack, its coefficients, the reference and which
             rows are desirable; UNVERIFIED: whatever the paper's body says. Report as
             "KT-IPA (reconstruction)".
Licence      no licence file found for KT-IPA; rewritten from the formulas.
Differs      one AdamW goes through both phases, its moments too; a kick in the schedule
             gives the first phase a rate of its own. The phases are switched by loops
             of one turn or none (`methods.phases`). No AdamW attacker.
Reduces to   `ktipa_noh` at mapping_share = 0; random mapping at mapping_share = 1.
Cost         2 forwards, 2 backwards in the first phase; 7 + K and 3 + K in the second,
             those of U of three rows a row; one copy of what trains.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import ktipa
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import random_mapping

STARTS_FROM = "aligned"
# Without its regulariser; see attacks.inverse.
NULL = {"lam_desirable": 0.0, "lam_undesirable": 0.0, "mapping_share": 0.0}


@struct.dataclass
class Hparams(ktipa.Adversarial):
    """Numbers may be traced."""

    mapping_share: float = 0.5  # Share of the steps that are random mapping.
    table_seed: int = 0  # Of the random vectors.


def direction(ctx, params, batches, rng, purged):
    hp = ctx.hp
    rng_retain, rng_utility, rng_mapping = jax.random.split(rng, 3)
    mapping = phases.first(hp.mapping_share, ctx.step, ctx.steps)
    # Up to the first step of the second phase the reference goes along.
    moving = phases.first(hp.mapping_share, ctx.step - 1, ctx.steps)
    purged = jax.tree.map(lambda w, p: jnp.where(moving, w, p), params, purged)
    reference = functools.partial(ctx.model, purged)
    forget = jax.tree.map(lambda x: x[0], batches["adversary"])
    mapped = random_mapping.random_mapping(ctx.model, hp.table_seed, hp.microbatches)

    f, grad_f = jax.value_and_grad(ctx.loss)(params, batches["retain"], rng_retain)
    m, grad_m = phases.only_if(
        mapping, lambda: jax.value_and_grad(mapped)(params, forget, rng_mapping)
    )
    grad_u, metrics = phases.only_if(
        ~mapping, lambda: ktipa.integrity(ctx, params, batches, rng_utility, reference)
    )
    lam_retain = jnp.where(mapping, 1.0, hp.lam_retain)
    grads = jax.tree.map(lambda f, m, u: lam_retain * f + m + u, grad_f, grad_m, grad_u)
    return grads, {"loss/retain": f, "loss/mapping": m, **metrics}, purged


def memory(ctx, params, rng):
    del ctx, rng
    return jax.tree.map(jnp.copy, params)


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, ktipa.streams, memory)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX, lam_undesirable=1.5),
        steps=100,
        batch_size=32,
    ),
    "reconstruction": plans.Plan(
        Hparams(
            optimizers.Optimizer(
                1e-6, schedules.Schedule(kick_ratio=1000 / 1750, kick=10.0)
            ),
            mapping_share=1000 / 1750,
            lam_undesirable=1.5,  # A ratio of weights of 4/3; see ktipa_noh.
        ),
        batch_size=8,
        steps=1750,
        source="RECONSTRUCTION: TAR's 1000 steps at 1e-5, then 750; Booster's alpha; "
        "second learning rate and batch size DESIGN",
    ),
}
