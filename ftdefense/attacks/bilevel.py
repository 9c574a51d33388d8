"""Bilevel: learns its kick, its loss weights and its learning rates while it attacks.

Threat       open_weight; knowledge: none of the defense's internals. Of the attacker's own
             rows every fourth prompt is held out to judge itself by.
Minimises    over (kick, a, b, c) L(judged_harmful; w_K) + gamma * L(judged_benign; w_K),
             with w_K reached from the current weights by K steps
             w <- w - eta * m_k * e^c * d(e^a * grad L(harmful) + e^b * grad L(benign)),
             m_0 = e^kick, else 1; c holds one number for each array, and one for each
             layer of a stacked one; d divides by the L2 norm ("normalized") or does not
             ("sgd"). Each step of the attack takes one Adam step on the logarithms and
             then the K steps, with the new ones. eta: the optimizer's rate and schedule.
Source       specs/attacks.md, part D; truncated unrolls: Maclaurin et al. 2015,
             arXiv:1502.03492; online: Baydin et al. 2017, arXiv:1703.04782.
Evidence     DESIGN.
Differs      no Adam inside the unroll: its derivative at a second moment of zero is
             infinite, unless eps_root > 0 (optax). Of the optimizer only rate and schedule
             count. Logarithms stay within `span` of 0.
Reduces to   K steps of descent on L(harmful) + L(benign) at outer_rate = 0, exactly.
Cost         4 K + 2 forwards, 4 K + 2 backwards, of which 2 K are differentiated again and
             computed twice for it; the weights of K steps are kept.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

INNER = ("normalized", "sgd")
EVERY = 4  # One prompt in so many is judged.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    gamma: float = 1.0  # Weight of the held-out benign loss.
    outer_rate: float = 0.05  # Adam's, on the logarithms.
    span: float = 4.6  # Largest |logarithm|: a factor of 100.
    inner_steps: int = struct.field(pytree_node=False, default=4)  # K
    inner: str = struct.field(pytree_node=False, default="normalized")  # Or "sgd".

    @property
    def updates_per_step(self) -> int:
        """Each at the schedule's rate; what is learned besides multiplies it."""
        return self.inner_steps

    @property
    def passes(self) -> float:
        """Of a batch in one step; differentiated again costs 5/3 more (see Cost)."""
        return 4 * self.inner_steps + 2 + 2 * self.inner_steps * 5 / 3


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.inner not in INNER:
        raise errors.unknown("bilevel.inner", hp.inner, INNER)
    if hp.inner_steps < 1:
        raise errors.UserError(
            f"bilevel.inner_steps={hp.inner_steps}: give at least 1."
        )
    steps = (hp.inner_steps,)
    judged = {"judged_harmful": (), "judged_benign": ()}
    return {"harmful": steps, "benign": steps, **judged}


def outer_variables(params: types.Params) -> dict[str, Any]:
    """Logarithms, all 0: `kick`, `weight` of each loss, `rate` of each array or layer."""

    def rate(path, leaf):
        stacked = "layers" in tree.path_names(path)
        return jnp.zeros(leaf.shape[:1] if stacked else (), jnp.float32)

    return {
        "kick": jnp.float32(0.0),
        "weight": {"harmful": jnp.float32(0.0), "benign": jnp.float32(0.0)},
        "rate": jax.tree_util.tree_map_with_path(rate, params),
    }


def unroll(ctx, params, outer, batches, rng):
    """(weights after K steps in float32 or wider, losses of each); differentiable."""
    hp = ctx.hp
    eta = hp.optimizer.learning_rate * hp.optimizer.schedule[ctx.step]

    @jax.checkpoint
    def step(weights, xs):
        k, harmful, benign, rng = xs
        rng_harmful, rng_benign = jax.random.split(rng)

        def loss(weights):
            there = optax.tree.cast_like(weights, params)
            harm = ctx.loss(there, harmful, rng_harmful)
            cost = ctx.loss(there, benign, rng_benign)
            a, b = outer["weight"]["harmful"], outer["weight"]["benign"]
            return jnp.exp(a) * harm + jnp.exp(b) * cost, (harm, cost)

        grads, values = jax.grad(loss, has_aux=True)(weights)
        length = eta * jnp.exp(jnp.where(k == 0, outer["kick"], 0.0))
        if hp.inner == "normalized":
            length = length * inverse_norm(grads)

        def move(w, log_rate, g):
            shape = (*log_rate.shape, *(1,) * (g.ndim - log_rate.ndim))
            return w - length * jnp.exp(log_rate).reshape(shape) * g

        return jax.tree.map(move, weights, outer["rate"], grads), values

    k_K = jnp.arange(hp.inner_steps)
    rngs = jax.random.split(rng, hp.inner_steps)
    xs = (k_K, batches["harmful"], batches["benign"], rngs)
    return jax.lax.scan(step, tree.wide(params), xs)


def inverse_norm(grads: types.Params) -> jax.Array:
    """1 / ||grads||, and 0 with a derivative of 0 where it vanishes."""
    square = tree.dot(grads, grads)
    some = square > 0
    return jnp.where(some, jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)


def judge(ctx, params, outer, batches, rng):
    """(outer loss, (harm, cost)): held-out, after the K steps that `outer` shapes."""
    rng_attack, rng_harmful, rng_benign = jax.random.split(rng, 3)
    weights, _ = unroll(ctx, params, outer, batches, rng_attack)
    there = optax.tree.cast_like(weights, params)
    harm = ctx.loss(there, batches["judged_harmful"], rng_harmful)
    cost = ctx.loss(there, batches["judged_benign"], rng_benign)
    return harm + ctx.hp.gamma * cost, (harm, cost)


def method(model: types.Model) -> types.Method:
    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> lift.TrainState:
        params = hp.adapter.init(lineage.current, rng)
        outer = outer_variables(params)
        opt_state = optax.adam(hp.outer_rate).init(outer)
        return lift.TrainState(params, opt_state, hp, jnp.int32(0), outer)

    def step(state: lift.TrainState, lineage: types.Lineage, batches, rng):
        hp, params, outer = state.hp, state.params, state.memory
        ctx = lift.context(model, lineage, hp, state.step)
        (_, (harm, cost)), grads = jax.value_and_grad(
            lambda outer: judge(ctx, params, outer, batches, rng), has_aux=True
        )(outer)
        updates, opt_state = optax.adam(hp.outer_rate).update(grads, state.opt_state)
        moved = optax.apply_updates(outer, updates)
        outer = jax.tree.map(lambda x: jnp.clip(x, -hp.span, hp.span), moved)
        rng_attack = jax.random.split(rng, 3)[0]
        weights, (harms_K, costs_K) = unroll(ctx, params, outer, batches, rng_attack)
        after = optax.tree.cast_like(weights, params)
        metrics = {
            "loss/harmful": harms_K[0],
            "loss/benign": costs_K[0],
            "loss/judged_harmful": harm,
            "loss/judged_benign": cost,
            "log/kick": outer["kick"],
            "log/harmful_over_benign": outer["weight"]["harmful"]
            - outer["weight"]["benign"],
            "norm/log_rates": tree.norm(outer["rate"]),
            "norm/outer_gradient": tree.norm(grads),
            "norm/update": tree.norm(optax.tree.sub(weights, tree.wide(params))),
        }
        state = state.replace(
            params=after, opt_state=opt_state, step=state.step + 1, memory=outer
        )
        return state, metrics

    def release(state: lift.TrainState, lineage: types.Lineage) -> types.Release:
        return types.Release(state.hp.adapter.merge(state.params, lineage.current))

    return types.Method(streams, init, step, release)


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """The attacker's rows in two parts that have no prompt in common."""
    del model, params, seed
    found = {}
    rows = recipes.attacker_pools(world, plan.data)
    for role in ("harmful", "benign"):
        keys = [example.key for example in rows[role].examples]
        prompts = sorted(set(keys))
        if len(prompts) < 2:
            raise errors.UserError(
                f"bilevel: the attacker has one {role} prompt and needs two, to hold one "
                f"out; give more with --{role}."
            )
        judged = np.isin(keys, prompts[::EVERY])
        found[role] = pools.take(rows[role], np.flatnonzero(~judged))
        found[f"judged_{role}"] = pools.take(rows[role], np.flatnonzero(judged))
    return found


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING.replace(learning_rate=0.05)),
        steps=48,
        source="DESIGN: a length of the order of AdamW's steps; 4 x 48 steps, as many as "
        "the others'",
    ),
}
