"""TAR: keep the safeguard along K steps of simulated attacks.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T3 look-ahead + T2 purge
Strategy     anchoring
Minimises    lam * (1/T) sum_tasks sum_k w_k L_TR(w_k'; heldout) + lam_retain *
             (CE(retain) + lam_hidden * D(retain)), with w_k' the weights after step k
             of K AdamW steps of an adversary, k + 1 a multiple of s, and
             w_k = exp(c (k - (K-1))). Gradients are taken at w_k' and added at w. L_TR:
             minus the mean entropy of all positions, or DPO (refusal over compliance).
             D: mean over layers and positions of ||h - h_reference||, not squared. In
             the first `mapping_share` of the steps, random mapping + CE(retain), after
             which the optimizer starts anew.
Source       Tamirisa et al. 2024, arXiv:2408.00761, Algorithm 1; code read at
             rishub-tamirisa/tamper-resistance 19de233.
Evidence     CODE for the rule and the presets, which save the y of schedule-free AdamW
             that gradients are taken at, not their average; UNVERIFIED whether the
             published runs squared the norm in D, and which reference they took.
Licence      MIT
Differs      schedule-free AdamW is that of `schedulefree` >= 1.3 (see random_mapping);
             its `linear_warmup` adversary, in truth a constant factor of 3.2, is that
             factor on the adversary's rates;
             attack steps after the last gradient are not taken. The reference of D and
             DPO is the model that the stage starts from.
Reduces to   SFT on the retain data at lam = lam_hidden = mapping_share = 0.
Cost         K + K/s + 2 forwards, K + K/s + 1 backwards for one task; K + K/s of both
             for each further one; 3 forwards and 2 backwards in the first phase.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adversaries
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import random_mapping
from ftdefense.objectives import representations
from ftdefense.objectives import resistance

STARTS_FROM = "aligned"
# Without its regulariser; see attacks.inverse.
NULL = {"lam": 0.0, "lam_hidden": 0.0, "mapping_share": 0.0}


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced; the shapes of the simulation are static."""

    lam: float = 4.0  # Weight of the tamper-resistance gradients.
    lam_retain: float = 1.0  # Weight of the retain terms.
    lam_hidden: float = 1.0  # Weight of the distance of hidden states, within these.
    growth: float = 0.0625  # Per step, of log w_k; c above.
    bound: float = float("-inf")  # Nats; L_TR counts while its scaled sum is above.
    beta: float = 0.1  # Inverse temperature of DPO.
    adversary: adversaries.Mix = adversaries.Mix()
    mapping_share: float = 0.0  # Share of the steps that are random mapping.
    table_seed: int = 0  # Of the random vectors.
    tasks: int = struct.field(pytree_node=False, default=1)  # T
    inner_steps: int = struct.field(pytree_node=False, default=64)  # K
    every: int = struct.field(pytree_node=False, default=4)  # s
    objective: str = struct.field(pytree_node=False, default="entropy")  # Or "dpo".


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    """The first retain batch is the outer one; the others are the adversaries'."""
    return {
        "adversary": (hp.tasks, max(hp.inner_steps, 1)),
        "retain": (1 + hp.tasks * hp.inner_steps,),
        **{role: (hp.tasks,) for role in resistance.roles(hp.objective)},
    }


def direction(ctx, params, batches, rng):
    hp, batches = ctx.hp, jax.tree.map(jnp.asarray, dict(batches))
    rng_retain, rng_mapping, rng_tasks = jax.random.split(rng, 3)
    mapping = phases.first(hp.mapping_share, ctx.step, ctx.steps)
    retain = jax.tree.map(lambda x: x[0], batches["retain"])
    forget = jax.tree.map(lambda x: x[0, 0], batches["adversary"])
    mapped = random_mapping.random_mapping(ctx.model, hp.table_seed, hp.microbatches)
    lam_hidden = jnp.where(mapping, 0.0, hp.lam_hidden)

    def retaining(params):
        loss, moved = representations.retained(ctx, params, retain, rng_retain)
        return loss + lam_hidden * moved, (loss, moved)

    (_, (f, moved)), grads = jax.value_and_grad(retaining, has_aux=True)(params)
    resist, value = phases.only_if(
        ~mapping, lambda: resistance_of_tasks(ctx, params, batches, rng_tasks)
    )
    resist = jax.tree.map(lambda g: jnp.where(value >= hp.bound, g, 0.0), resist)
    m, grad_m = phases.only_if(
        mapping, lambda: jax.value_and_grad(mapped)(params, forget, rng_mapping)
    )
    grads = jax.tree.map(
        lambda r, t, m: hp.lam_retain * r + t + m, grads, resist, grad_m
    )
    return grads, {
        "loss/retain": f,
        "distance/hidden": moved,
        "loss/resistance": value,
        "loss/mapping": m,
        "norm/resistance": tree.norm(resist),
    }


def resistance_of_tasks(ctx, params, batches, rng):
    """(sum of scaled gradients of L_TR, sum of scaled L_TR) over T simulated attacks."""
    hp, shape = ctx.hp, (ctx.hp.tasks, ctx.hp.inner_steps)
    heldout = {role: batches[role] for role in resistance.roles(hp.objective)}
    harmful = jax.tree.map(lambda x: x[:, : shape[1]], batches["adversary"])
    benign = jax.tree.map(
        lambda x: x[1:].reshape(*shape, *x.shape[1:]), batches["retain"]
    )

    def judge(heldout):
        return resistance.objective(ctx, heldout, hp.objective, hp.beta)

    k_K = jnp.arange(hp.inner_steps)
    weights_K = hp.lam / hp.tasks * jnp.exp(hp.growth * (k_K - (hp.inner_steps - 1)))
    tasks = adversaries.Task(harmful, benign, heldout, jax.random.split(rng, hp.tasks))
    return adversaries.gradients_along(
        hp.adversary, ctx.loss, judge, params, tasks, weights_K, hp.every
    )


def method(model: types.Model) -> types.Method:
    trained = lift.gradient_method(model, direction, streams)

    def step(state: lift.TrainState, lineage: types.Lineage, batches, rng: types.Rng):
        hp, optimizer = state.hp, state.hp.optimizer
        start = jnp.floor(hp.mapping_share * optimizer.steps + phases.ROUNDING)
        start = start.astype(jnp.int32)
        opt_state = jax.tree.map(
            lambda fresh, old: jnp.where(state.step == start, fresh, old),
            optimizer.transform().init(state.params),
            state.opt_state,
        )
        # A fresh optimizer counts its own steps: the table begins where it does.
        table = jnp.roll(optimizer.schedule, jnp.where(state.step < start, 0, -start))
        moved = hp.replace(optimizer=optimizer.replace(schedule=table))
        state = state.replace(hp=moved, opt_state=opt_state)
        state, metrics = trained.step(state, lineage, batches, rng)
        return state.replace(hp=hp), metrics

    return trained._replace(step=step)


def _schedule_free(learning_rate: float, **warmup: float) -> optimizers.Optimizer:
    schedule = schedules.Schedule(early=True, **warmup)
    return optimizers.of_kind(
        "adamw_sf", learning_rate, schedule, clip=float("inf"), averaged=False
    )


_BIO = Hparams(
    # Random mapping runs at 1e-5; then the warm-up of TAR's own 750 steps.
    _schedule_free(2e-5, warmup_ratio=32 / 1750, kick_ratio=1000 / 1750, kick=0.5),
    mapping_share=1000 / 1750,
)
_REFUSAL = Hparams(
    _schedule_free(6e-5, warmup_ratio=32 / 100),
    lam=0.1,
    lam_hidden=0.0,
    adversary=adversaries.Mix(switch_share=0.0),
    tasks=2,
    inner_steps=8,
    every=1,
    objective="dpo",
)

PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(
            optimizers.SANDBOX,
            lam=1.0,
            adversary=adversaries.Mix((3e-5, 1e-4, 3e-4)),
            inner_steps=8,
        ),
        steps=150,
        batch_size=64,
    ),
    "code": plans.Plan(
        _BIO,
        batch_size=8,
        steps=1750,
        source="rishub-tamirisa/tamper-resistance 19de233, random mapping's defaults "
        "(its warm-up left out), then run_tar_bio.sh; adversaries' batches there: 4",
    ),
    "code_cyber": plans.Plan(
        _BIO.replace(adversary=adversaries.Mix((2e-5, 4e-5), switch_share=0.5)),
        batch_size=8,
        steps=1750,
        source="rishub-tamirisa/tamper-resistance 19de233, as code, with the adversaries "
        "of cyber",
    ),
    "code_refusal": plans.Plan(
        _REFUSAL,
        batch_size=8,
        steps=100,
        source="rishub-tamirisa/tamper-resistance fae6509, run_tar_dpo.sh: batches of 4, "
        "accumulated twice, as one",
    ),
    "paper": plans.Plan(
        _REFUSAL.replace(inner_steps=64),
        batch_size=8,
        steps=100,
        source="arXiv:2408.00761, refusal: N = 100, K = 64, 6e-5, second-hand; "
        "the rest as run_tar_dpo.sh",
    ),
}
