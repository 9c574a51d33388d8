"""CLAMP: make the attacker's own training contract, where harmful loss is still high.

Stage        alignment.
Template     T3 look-ahead
Strategy     anchoring
Minimises    L(retain) + lam_long * max(0, act + tail - margin)
             + lam_contraction * softplus(c - contraction)
             + lam_curvature * sum_t softplus(curvature - k_t) - lam_initial * h(w_0), with
             h the harmful loss on one batch, T(w) = w - eta * grad h(w), w_0 .. w_K its
             iterates; c = ||T(w_K + e v) - T(w_K)|| / e for a random unit v; act = h(w_0) -
             h(w_K); tail = ||g_K|| B + smoothness / 2 * B^2, B = eta ||g_K|| / (1 - c);
             k_t = (h(w_t + d u) - 2 h(w_t) + h(w_t - d u)) / d^2, u along grad h(w_t).
Source       Sarker et al. 2026, CVPR, "Immunizing Models Against Harmful Long-Horizon
             Fine-Tuning via Contractive Optimization Dynamics", arXiv id UNVERIFIED; no
             code found (specs: perturbation_and_meta 5.6).
Evidence     second-hand for the terms; UNVERIFIED: every number. DESIGN: T is one batch's
             full-gradient step on all that trains; exact derivatives pass through the K
             steps and the probe, none through v and u; t = 0 .. K-1; 1 - c counts as at
             least `gap`; `smoothness` is a constant.
Licence      no code found: written from formulas.
Differs      as DESIGN says. h(w_0) grows without bound where lam_initial is large.
Reduces to   SFT on the retain data where all four weights are 0, exactly.
Cost         3 K + 3 forwards, 3 K + 3 backwards, K + 2 of which are differentiated
             again; the weights of all K steps are kept, their passes computed twice.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import draws
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

# Without its regulariser; see attacks.inverse.
NULL = {f"lam_{x}": 0.0 for x in ("long", "contraction", "curvature", "initial")}


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced; none is published."""

    lam_long: float = 1.0  # Weight of the bound on all progress, now and later.
    lam_contraction: float = 1.0  # Weight of c above `contraction`.
    lam_curvature: float = 0.1  # Weight of k_t below `curvature`.
    lam_initial: float = 0.01  # Weight of the ascent on h(w_0).
    eta: float = 0.1  # The attacker's learning rate: plain gradient descent.
    margin: float = 0.0  # Nats of progress that are allowed.
    contraction: float = 0.9  # c_max: of T near w_K, per unit of distance.
    curvature: float = 1.0  # kappa_min: nats per squared length.
    smoothness: float = 1.0  # Nats per squared length, in the bound of the tail.
    gap: float = 0.1  # Least 1 - c in B: over few steps, c of a random v is near 1.
    probe: float = 0.01  # e: length of the displacement along v.
    reach: float = 0.1  # d: length of those along u.
    inner_steps: int = struct.field(pytree_node=False, default=4)  # K.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"retain": (), "harmful": ()}


def immunised(loss, params, hp: Hparams, v):
    """(sum of the four terms, metrics); `loss` maps weights to the harmful loss."""

    @jax.checkpoint
    def step(weights, _):
        value, grads = jax.value_and_grad(loss)(weights)
        u = jax.lax.stop_gradient(tree.normalize(grads))
        above, below = (
            loss(tree.add_scale(weights, d, u)) for d in (hp.reach, -hp.reach)
        )
        bend = (above - 2 * value + below) / jnp.square(hp.reach)
        return tree.add_scale(weights, -hp.eta, grads), (value, bend)

    start = tree.wide(params)
    end, (values_K, bends_K) = jax.lax.scan(step, start, length=hp.inner_steps)
    last, grads = jax.value_and_grad(loss)(end)
    first = values_K[0] if hp.inner_steps else last
    nearby = jax.grad(loss)(tree.add_scale(end, hp.probe, v))
    # T(w_K + e v) - T(w_K), over e, without the cancellation of w_K in float32.
    difference = tree.add_scale(nearby, -1.0, grads)
    c = length(tree.add_scale(v, -hp.eta / hp.probe, difference))
    slope = length(grads)
    further = hp.eta * slope / jnp.maximum(1 - c, hp.gap)
    tail = slope * further + hp.smoothness / 2 * jnp.square(further)
    progress = first - last + tail
    terms = {
        "penalty/progress": hp.lam_long * jnp.maximum(progress - hp.margin, 0.0),
        "penalty/contraction": hp.lam_contraction * jax.nn.softplus(c - hp.contraction),
        "penalty/curvature": hp.lam_curvature
        * jnp.sum(jax.nn.softplus(hp.curvature - bends_K)),
        "penalty/initial": -hp.lam_initial * first,
    }
    metrics = {
        **terms,
        "loss/harmful": first,
        "loss/attacked": last,
        "progress/bound": progress,
        "rate/contraction": c,
    }
    return sum(terms.values()), metrics


def length(x) -> jax.Array:
    """L2 norm over all leaves, with a gradient of zero at zero."""
    square = tree.dot(x, x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def direction_of(rng, params):
    """A random tree of length one, in float32 or wider."""
    leaves, structure = jax.tree.flatten(params)
    rngs = jax.random.split(rng, len(leaves))
    normal = [
        draws.normal(r, x.shape, jnp.promote_types(x.dtype, jnp.float32))
        for r, x in zip(rngs, leaves, strict=True)
    ]
    return tree.normalize(jax.tree.unflatten(structure, normal))


def direction(ctx, params, batches, rng):
    rng_retain, rng_harmful, rng_probe = jax.random.split(rng, 3)
    v = direction_of(rng_probe, params)

    def harmful(weights):
        # The same dropout in every pass: T is one map.
        return ctx.loss(weights, batches["harmful"], rng_harmful)

    def penalty(weights):
        return immunised(harmful, weights, ctx.hp, v)

    f, grads = jax.value_and_grad(ctx.loss)(params, batches["retain"], rng_retain)
    (_, metrics), grads_penalty = jax.value_and_grad(penalty, has_aux=True)(params)
    grads = tree.add_scale(grads, 1.0, grads_penalty)
    return grads, {"loss/retain": f, **metrics}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX_ALIGNMENT, lam_long=0.1, inner_steps=2),
        steps=100,
        batch_size=64,
    ),
}
