"""MLAC: weights from which K steps of an attack lead nowhere, by second order.

Stage        alignment; starts from an aligned chat model. A re-implementation in MLAC's
             style (Self-Destructing Models): there is no official code.
Starts from  aligned
Template     T3 look-ahead
Strategy     anchoring
Minimises    CE(retain; w) - lam * (1/K) sum_k l_k, l_k = min_W CE(W logits(w_k); heldout)
             over a linear W with entries in [-1, 1], w_0 = w and w_k the weights after k
             steps of an adversary on harmful batches: Adam with a learned rate for every
             array, or SGD. The gradient passes through the steps. The adversary's
             log-rates descend on (1/K) sum_k l_k.
Source       Henderson et al. 2022, arXiv:2211.14946, second-hand (specs:
             perturbation_and_meta 3.2).
Evidence     RECONSTRUCTION for language models; UNVERIFIED in all details.
Licence      no official code: rewritten from formulas.
Differs      one head for both tasks, at which the adversary starts too, as an attacker of
             open weights does: no learned head of its own. W is one number by default
             (`calibration` = "map" is the V x V of the paper) and is fitted to the batch
             that it is judged on. The rates descend by clipped gradient steps.
Reduces to   SFT on the retain data at lam = 0, exactly.
Cost         4 K + 1 forwards, 5 K + 1 backwards; the weights of K steps are kept, with
             Adam's moments.
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
from ftdefense.methods import plans
from ftdefense.objectives import calibration
from ftdefense.objectives import parts

STARTS_FROM = "aligned"
ADVERSARIES = ("adam", "sgd")
NULL = {"lam": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam: float = 1.0  # Weight of the adversary's mean loss.
    rate: float = 1e-4  # Of the adversary, at first; for every array.
    rate_step: float = 0.01  # Step of its log-rates, whose gradient is clipped to 1.
    b1: float = 0.9
    b2: float = 0.999
    # Under the root, else gradients near zero have steps of almost infinite slope.
    eps_root: float = 1e-8  # Squared nats per unit of weight.
    inner_steps: int = struct.field(pytree_node=False, default=16)  # K
    adversary: str = struct.field(pytree_node=False, default="adam")  # Or "sgd".
    calibration: str = struct.field(pytree_node=False, default="scale")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.adversary not in ADVERSARIES:
        raise errors.unknown("adversary", hp.adversary, ADVERSARIES)
    if hp.inner_steps < 1:
        raise errors.UserError(f"mlac: inner_steps={hp.inner_steps}; set at least 1.")
    return {"adversary": (hp.inner_steps,), "heldout": (), "retain": ()}


def log_rates(ctx, params, rng):
    """The adversary's first: one for every array."""
    del rng
    return jax.tree.map(lambda _: jnp.log(jnp.float32(ctx.hp.rate)), params)


def direction(ctx, params, batches, rng, log_rates):
    rng_retain, rng_attack = jax.random.split(rng)
    f, grad_f = jax.value_and_grad(ctx.loss)(params, batches["retain"], rng_retain)

    def attacked(params, log_rates):
        judged_K = along_attack(ctx, params, log_rates, batches, rng_attack)
        return jnp.mean(judged_K), judged_K[-1]

    derivatives = jax.value_and_grad(attacked, argnums=(0, 1), has_aux=True)
    (h, last), (grad_h, grad_rates) = derivatives(params, log_rates)
    grads = tree.add_scale(grad_f, -ctx.hp.lam, grad_h)
    grad_rates, _ = optimizers.clip(1.0).update(grad_rates, optax.EmptyState())
    stronger = tree.add_scale(log_rates, -ctx.hp.rate_step, grad_rates)
    rates = jnp.stack(jax.tree.leaves(log_rates))
    return (
        grads,
        {
            "loss/retain": f,
            "loss/attacked": h,
            "loss/attacked_last": last,
            "norm/attacked": tree.norm(grad_h),
            "rate/adversary": jnp.exp(jnp.mean(rates)),
        },
        stronger,
    )


def along_attack(ctx, params, log_rates, batches, rng):
    """Calibrated held-out losses after each of K steps, [K]; differentiable in full."""
    hp = ctx.hp
    precondition = {
        "adam": optax.scale_by_adam(hp.b1, hp.b2, eps=0.0, eps_root=hp.eps_root),
        "sgd": optax.identity(),
    }[hp.adversary]

    def step(carry, xs):
        (theta, state), (batch, rng) = carry, xs
        rng_step, rng_judge = jax.random.split(rng)
        # Kept in float32 or wider, evaluated in the precision of the model.
        grads = jax.grad(ctx.loss)(optax.tree.cast_like(theta, params), batch, rng_step)
        moves, state = precondition.update(tree.wide(grads), state, theta)
        theta = jax.tree.map(
            lambda w, log_rate, move: w - jnp.exp(log_rate) * move,
            theta,
            log_rates,
            moves,
        )
        there = optax.tree.cast_like(theta, params)
        return (theta, state), judge(ctx, there, batches["heldout"], rng_judge)

    start = tree.wide(params)
    xs = (batches["adversary"], jax.random.split(rng, hp.inner_steps))
    # Kept for the way back: the weights between steps, not what is inside of one.
    _, judged_K = jax.lax.scan(
        jax.checkpoint(step), (start, precondition.init(start)), xs
    )
    return judged_K


def judge(ctx, params, heldout, rng):
    """The loss that is left to an adversary who may also calibrate."""

    def logits(rows, rng):
        return ctx.model(params, rows.tokens, rng=rng).logits

    logits_BxLxV = parts.stacked(logits, heldout, ctx.hp.microbatches, rng)
    return calibration.loss(logits_BxLxV, heldout, ctx.hp.calibration)


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, streams, log_rates)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX, lam=0.3, inner_steps=4),
        steps=100,
        batch_size=64,
    ),
    "paper": plans.Plan(
        Hparams(optimizers.Optimizer(2e-5)),
        source="arXiv:2211.14946: K = 16, second-hand; all else DESIGN",
    ),
}
