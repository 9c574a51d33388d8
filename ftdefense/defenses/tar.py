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
             the first `mapping_share` of the steps, random mapping + CE(retain).
Source       Tamirisa et al. 2024, arXiv:2408.00761, Algorithm 1; code read at
             rishub-tamirisa/tamper-resistance 19de233.
Evidence     CODE for the rule and the presets; UNVERIFIED whether the published runs
             squared the norm in D, and which reference they took.
Licence      MIT
Differs      AdamW in place of schedule-free AdamW; its `linear_warmup` adversary, in
             truth a constant factor, is left out; attack steps after the last gradient
             are not taken; the phases are switched by loops of one turn or none
             (`methods.phases`), not by a second run. The reference of D and of DPO is
             the model that the stage starts from.
Reduces to   SFT on the retain data at lam = lam_hidden = mapping_share = 0.
Cost         K + K/s + 2 forwards, K + K/s + 1 backwards, each task; 3 forwards and 2
             backwards in the first phase.
"""

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import losses
from ftdefense.objectives import parts
from ftdefense.objectives import random_mapping
from ftdefense.objectives import representations
from ftdefense.objectives import resistance

STARTS_FROM = "aligned"


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced; the shapes of the simulation are static."""

    lam: float = 4.0  # Weight of the tamper-resistance gradients.
    lam_retain: float = 1.0  # Weight of the retain terms.
    lam_hidden: float = 1.0  # Weight of the distance of hidden states, within these.
    growth: float = 0.0625  # Per step, of log w_k; c above.
    bound: float = -float(
        "inf"
    )  # Nats; below it (sum of scaled L_TR) no L_TR gradient.
    beta: float = 0.1  # Inverse temperature of DPO.
    learning_rates: tuple[float, ...] = (2e-6, 2e-5, 4e-5)  # Of AdamW; one a task.
    weight_decay: float = 0.01  # Of the adversary's AdamW, on all that trains.
    switch_share: float = 1 / 3  # Probability of an adversary that begins with retain.
    switch_a: float = 6.0  # It switches after floor(K * Beta(a, b)) steps.
    switch_b: float = 3.0
    mapping_share: float = 0.0  # Share of the steps that are random mapping.
    table_seed: int = 0  # Of the random vectors.
    tasks: int = struct.field(pytree_node=False, default=1)  # T
    inner_steps: int = struct.field(pytree_node=False, default=64)  # K
    every: int = struct.field(pytree_node=False, default=4)  # s
    objective: str = struct.field(pytree_node=False, default="entropy")  # Or "dpo".


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    """The first retain batch is the outer one; the others are the adversaries'."""
    if hp.objective not in resistance.OBJECTIVES:
        raise errors.unknown("objective", hp.objective, resistance.OBJECTIVES)
    found = {
        "adversary": (hp.tasks, max(hp.inner_steps, 1)),
        "heldout": (hp.tasks,),
        "retain": (1 + hp.tasks * hp.inner_steps,),
    }
    paired = {"heldout_refusal": (hp.tasks,)} if hp.objective == "dpo" else {}
    return {**found, **paired}


def direction(ctx, params, batches, rng):
    hp, batches = ctx.hp, jax.tree.map(jnp.asarray, dict(batches))
    rng_retain, rng_mapping, rng_tasks = jax.random.split(rng, 3)
    mapping = phases.first(hp.mapping_share, ctx.step, ctx.steps)
    retain, forget = batches["retain"], batches["adversary"]
    retain = jax.tree.map(lambda x: x[0], retain)
    forget = jax.tree.map(lambda x: x[0, 0], forget)
    mapped = random_mapping.random_mapping(ctx.model, hp.table_seed, hp.microbatches)

    def retaining(params):
        loss, moved = kept(ctx, params, retain, rng_retain)
        # In the first phase the cross-entropy is kept alone.
        return loss + jnp.where(mapping, 0.0, hp.lam_hidden) * moved, (loss, moved)

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


def kept(ctx, params, batch, rng):
    """(CE, distance of the hidden states from the reference), of one forward pass."""

    def compute(batch, rng):
        outputs = ctx.model(params, batch.tokens, rng=rng)
        moved = representations.distance(outputs, ctx.reference(batch.tokens))
        return *losses.weighted_sums(outputs, batch), moved

    count = ctx.hp.microbatches
    total, weight, moved = parts.summed(compute, batch, count, rng)
    return total / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny), moved / count


def resistance_of_tasks(ctx, params, batches, rng):
    """(sum of scaled gradients of L_TR, sum of scaled L_TR) over T simulated attacks."""
    hp = ctx.hp
    benign = jax.tree.map(
        lambda x: x[1:].reshape(hp.tasks, hp.inner_steps, *x.shape[1:]),
        batches["retain"],
    )
    heldout = {role: b for role, b in batches.items() if role.startswith("heldout")}

    def task(total, xs):
        return simulate(ctx, params, total, *xs)

    total = jax.tree.map(jnp.zeros_like, wide(params))
    xs = (batches["adversary"], benign, heldout, jax.random.split(rng, hp.tasks))
    total, values = jax.lax.scan(task, total, xs)
    return total, jnp.sum(values)


def simulate(ctx, params, total, adversary, benign, heldout, rng):
    """Adds one adversary's gradients to `total`; returns it and the sum of its L_TR."""
    hp, blocks = ctx.hp, ctx.hp.inner_steps // ctx.hp.every
    rng_rate, rng_kind, rng_switch, rng_steps, rng_loss = jax.random.split(rng, 5)
    rate = jax.random.choice(rng_rate, jnp.asarray(hp.learning_rates))
    switches = jax.random.bernoulli(rng_kind, hp.switch_share)
    share = jax.random.beta(rng_switch, hp.switch_a, hp.switch_b)
    switch = jnp.where(switches, jnp.floor(hp.inner_steps * share), 0.0)
    optimizer = optax.adamw(rate, weight_decay=hp.weight_decay)
    objective = resistance.objective(ctx, heldout, hp.objective, hp.beta)

    def step(carry, xs):
        theta, state = carry
        k, forget, retain, rng = xs
        batch = jax.tree.map(lambda r, f: jnp.where(k < switch, r, f), retain, forget)
        # Kept in float32 or wider, evaluated in the precision of the model.
        grads = jax.grad(ctx.loss)(optax.tree.cast_like(theta, params), batch, rng)
        updates, state = optimizer.update(wide(grads), state, theta)
        return (optax.apply_updates(theta, updates), state), None

    def block(carry, xs):
        attacked, total = carry
        attacked, _ = jax.lax.scan(step, attacked, xs)
        k = xs[0][-1]
        weight = hp.lam / hp.tasks * jnp.exp(hp.growth * (k - (hp.inner_steps - 1)))
        there = optax.tree.cast_like(attacked[0], params)
        value, grads = jax.value_and_grad(objective)(
            there, jax.random.fold_in(rng_loss, k)
        )
        # First order: the gradient at the attacked weights is added at `params`.
        return (attacked, tree.add_scale(total, weight, grads)), weight * value

    xs = (
        jnp.arange(hp.inner_steps),
        adversary,
        benign,
        jax.random.split(rng_steps, hp.inner_steps),
    )
    # Steps after the last multiple of s lead to no gradient.
    xs = jax.tree.map(
        lambda x: x[: blocks * hp.every].reshape(blocks, hp.every, *x.shape[1:]), xs
    )
    start = (wide(params), optimizer.init(wide(params)))
    (_, total), values = jax.lax.scan(block, (start, total), xs)
    return total, jnp.sum(values)


def wide(params):
    """`params` in float32 or wider."""
    return jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params
    )


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_KNOWLEDGE = Hparams(
    optimizers.Optimizer(2e-5, schedules.Schedule(32 / 750), clip=float("inf"))
)
_REFUSAL = Hparams(
    optimizers.Optimizer(6e-5, schedules.Schedule(32 / 100), clip=float("inf")),
    lam=0.1,
    lam_hidden=0.0,
    switch_share=0.0,
    tasks=2,
    inner_steps=8,
    every=1,
    objective="dpo",
)

PRESETS = {
    "sandbox": plans.Plan(
        Hparams(
            optimizers.Optimizer(4e-4, schedules.Schedule(0.1, 0.05, decay="cosine")),
            learning_rates=(3e-5, 1e-4, 3e-4),
            inner_steps=8,
        ),
        source="DESIGN: BUILD_NOTES.md, Sandbox presets",
    ),
    "code": plans.Plan(
        _KNOWLEDGE,
        batch_size=8,
        steps=750,
        source="rishub-tamirisa/tamper-resistance 19de233, run_tar_bio.sh; its "
        "adversaries' batches have 4 rows",
    ),
    "code_cyber": plans.Plan(
        _KNOWLEDGE.replace(switch_share=0.5, learning_rates=(2e-5, 4e-5)),
        batch_size=8,
        steps=750,
        source="rishub-tamirisa/tamper-resistance 19de233, run_tar_cyber.sh; likewise",
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
