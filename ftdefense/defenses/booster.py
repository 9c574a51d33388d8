"""Booster: damp what one harmful step would gain.

Stage        alignment.
Template     T3 look-ahead
Strategy     anchoring
Minimises    f(w) + lam * (h(w) - h(w - alpha * grad h(w) / ||grad h(w)||)), with f the
             alignment loss and h the harmful loss on one batch; the gradient stops at
             the normalised step.
Source       Huang et al. 2024, arXiv:2409.01586, Eq. 1 and Algorithm 1; code read at
             git-disl/Booster 6421918.
Evidence     CODE
Licence      Apache-2.0
Differs      the look-ahead is a new tree in float32, not added and taken back in bf16.
Reduces to   SFT on the alignment data at lam = 0 or alpha = 0, exactly; Vaccine there with
             `perturb_aware`, which takes Vaccine's gradient of f (Vaccine + Booster).
Cost         3 forwards, 3 backwards; 4, 4 with `perturb_aware`.
"""

import dataclasses

from flax import struct
import jax
import optax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import vaccine
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

NULL = {"lam": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam: float = 5.0  # Weight of the regulariser; lambda in the paper.
    alpha: float = 0.1  # Length of the simulated step, L2 over all that trains.
    rho: float = 5.0  # Vaccine's, with `perturb_aware`; of the scripts.
    perturb_aware: bool = struct.field(pytree_node=False, default=False)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"alignment": (), "harmful": ()}


def direction(ctx, params, batches, rng):
    value_and_grad = jax.value_and_grad(ctx.loss)
    rng_alignment, rng_harmful = jax.random.split(rng)
    if ctx.hp.perturb_aware:
        shifted = vaccine.Hparams(rho=ctx.hp.rho)
        grad_f, metrics = vaccine.direction(
            ctx._replace(hp=shifted), params, batches, rng_alignment
        )
    else:
        f, grad_f = value_and_grad(params, batches["alignment"], rng_alignment)
        metrics = {"loss/alignment": f}
    h, grad_h = value_and_grad(params, batches["harmful"], rng_harmful)
    tampered = tree.add_scale(tree.wide(params), -ctx.hp.alpha, tree.normalize(grad_h))
    h_after, grad_h_after = value_and_grad(tampered, batches["harmful"], rng_harmful)
    gain = optax.tree.sub(grad_h, grad_h_after)
    grads = tree.add_scale(grad_f, ctx.hp.lam, gain)
    return grads, {
        **metrics,
        "loss/harmful": h,
        "gain/harmful": h - h_after,
        "norm/harmful": tree.norm(grad_h),
    }


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_CODE = Hparams(
    optimizers.Optimizer(5e-4, weight_decay=0.1),
    adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
)

_SCRIPT = plans.Plan(
    _CODE,
    batch_size=10,
    epochs=20,
    source="git-disl/Booster 6421918, script/alignment/smooth_align.sh",
)

PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_ALIGNMENT, lam=2.0)),
    "code": _SCRIPT,
    "code_vaccine": dataclasses.replace(
        _SCRIPT,
        hp=_CODE.replace(perturb_aware=True),
        source="git-disl/Booster 6421918, perturb_aware",
    ),
    "survey": plans.Plan(
        _CODE, batch_size=10, epochs=20, source="arXiv:2605.14605, Table 6"
    ),
}
