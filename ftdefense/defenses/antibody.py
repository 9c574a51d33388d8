"""Antibody: flatten the harmful loss, and refuse where one harmful step leads.

Stage        alignment; `antibody_tuning` is its half at the service.
Template     T1 basin + T3 look-ahead
Strategy     anchoring
Minimises    by g_a + lam_t * (g_h - g_h') + lam_refusal * g_r', with g_a and g_h the
             gradients of the alignment and the harmful loss, g_h' and g_r' those of the
             harmful loss and of refusals to the same prompts at
             w' = w - alpha * g_h / ||g_h||, held fixed. With g_s = g_h - g_h', lam_t is
             the running mean (`momentum`; the first value as it is) of
             max(0, eta - <g_a, g_s> / (||g_a|| ||g_s||))    (cosine; the code),
             max(0, eta - <g_a, g_s> / ||g_s||^2)            (projection; the paper:
             <g_a + lam g_s, g_s> >= eta ||g_s||^2; it has no mean: momentum = 0).
Source       Nguyen et al. 2026, arXiv:2603.00498; code read at minhquoc0712/Antibody
             1d4fa5f (specs: perturbation_and_meta 4.2).
Evidence     CODE for the rule and the preset; the paper's multiplier is from secondary
             notes; UNVERIFIED: where the paper's numbers differ from the code's.
Licence      none declared: rewritten from formulas.
Differs      refusals are the defender's own to these prompts, not a list of generic ones.
Reduces to   Booster at lam_refusal = 0 with a constant multiplier (momentum = 1); SFT on
             the alignment data at alpha = 0 and lam_refusal = 0, exactly.
Cost         4 forwards, 4 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

FINE_TUNING = "antibody_tuning"
MULTIPLIERS = ("cosine", "projection")
# Without its regulariser; see attacks.inverse.
NULL = {"alpha": 0.0, "lam_refusal": 0.0}


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    alpha: float = 0.1  # Length of the simulated step, L2 over all that trains.
    eta: float = 5.0  # lam_t where g_a and g_s are orthogonal; xi in the theorem.
    momentum: float = 0.99  # Of lam_t: share of its last value.
    lam_refusal: float = 0.05  # Weight of the refusals after the step; lambda2.
    multiplier: str = struct.field(pytree_node=False, default="cosine")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.multiplier not in MULTIPLIERS:
        raise errors.unknown("antibody multiplier", hp.multiplier, MULTIPLIERS)
    return {"alignment": (), "harmful": (), "refusal": ()}


def multiplier(grad_alignment, grad_sharpness, eta, kind: str) -> jax.Array:
    """lam_t before its running mean."""
    dot = tree.dot(grad_alignment, grad_sharpness)
    length = tree.norm(grad_sharpness)
    if kind == "cosine":
        ratio = dot / (tree.norm(grad_alignment) * length + 1e-8)
    else:
        square = jnp.square(length)
        ratio = jnp.where(square > 0, dot / jnp.where(square > 0, square, 1), 0.0)
    return jnp.maximum(eta - ratio, 0.0)


def direction(ctx, params, batches, rng, memory):
    hp, harmful = ctx.hp, batches["harmful"]
    value_and_grad = jax.value_and_grad(ctx.loss)
    rng_alignment, rng_harmful, rng_refusal = jax.random.split(rng, 3)
    h, grad_h = value_and_grad(params, harmful, rng_harmful)
    tampered = tree.add_scale(tree.wide(params), -hp.alpha, tree.normalize(grad_h))
    h_after, grad_h_after = value_and_grad(tampered, harmful, rng_harmful)
    sharpness = optax.tree.sub(grad_h, grad_h_after)
    r, grad_r = value_and_grad(tampered, batches["refusal"], rng_refusal)
    f, grad_f = value_and_grad(params, batches["alignment"], rng_alignment)
    raw = multiplier(grad_f, sharpness, hp.eta, hp.multiplier)
    mean = hp.momentum * memory["lam"] + (1 - hp.momentum) * raw
    lam = jnp.where(ctx.step == 0, raw, mean)
    grads = tree.add_scale(grad_f, lam, sharpness)
    grads = tree.add_scale(grads, hp.lam_refusal, grad_r)
    metrics = {
        "loss/alignment": f,
        "loss/harmful": h,
        "loss/refusal": r,
        "gain/harmful": h - h_after,
        "norm/harmful": tree.norm(grad_h),
        "multiplier/sharpness": lam,
    }
    return grads, metrics, {"lam": lam.astype(memory["lam"].dtype)}


def remember(ctx, params, rng) -> dict[str, jax.Array]:
    del ctx, params, rng
    return {"lam": jnp.float32(0.0)}


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, streams, remember)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_ALIGNMENT, eta=0.1)),
    "code": plans.Plan(
        Hparams(
            optimizers.Optimizer(5e-4, weight_decay=0.1),
            adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
        ),
        batch_size=16,
        epochs=20,
        source="minhquoc0712/Antibody 1d4fa5f, script/antibody, on 5000 rows",
    ),
}
