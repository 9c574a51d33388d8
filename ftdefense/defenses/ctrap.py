"""CTRAP: one harmful step away, the model already collapses to a fixed token.

Stage        alignment.
Template     T3 look-ahead
Strategy     self-destruct
Minimises    L(retain; w) + lam * C(retain; w - alpha * grad h(w) / ||grad h(w)||), with h
             the harmful loss and C the cross-entropy of `collapse_token` at every
             supervised position; retain holds alignment and general pairs; the gradient
             stops at the normalised step.
Source       Yi et al. 2025, arXiv:2505.16559; code read at
             clearloveclearlove/CTRAP bb0f07e (specs: perturbation_and_meta 5.1).
Evidence     CODE for the rule and the defaults.
Licence      none declared: rewritten from formulas.
Differs      its code takes half of each batch from the alignment rows and half from the
             general ones, ours draws from both mixed; its first LoRA for Qwen has rank
             64. `normalize` = False takes the paper's raw gradient, `second_order` = True
             differentiates through the step.
Reduces to   SFT on the retain data at lam = 0, exactly.
Cost         3 forwards, 3 backwards; 4 with `second_order`.
"""

from flax import struct
import jax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import losses

NULL = {"lam": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam: float = 0.1  # Weight of the collapse loss; lambda in the paper.
    alpha: float = 0.1  # Length of the simulated step, L2 over all that trains.
    collapse_token: int = 0  # Id of the one token of a collapsed model.
    normalize: bool = struct.field(pytree_node=False, default=True)
    second_order: bool = struct.field(pytree_node=False, default=False)


def prepare(hp: Hparams, world) -> Hparams:
    """Fills in what only the data know."""
    return hp.replace(collapse_token=world.collapse_id)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"retain": (), "harmful": ()}


def direction(ctx, params, batches, rng):
    hp, retain, harmful = ctx.hp, batches["retain"], batches["harmful"]
    rng_retain, rng_harmful, rng_collapse = jax.random.split(rng, 3)
    collapse_loss = losses.next_token(
        ctx.model, losses.toward(hp.collapse_token), hp.microbatches
    )
    collapse_after = look_ahead(
        lambda w: ctx.loss(w, harmful, rng_harmful),
        lambda w: collapse_loss(w, retain, rng_collapse),
        alpha=hp.alpha,
        normalize=hp.normalize,
        second_order=hp.second_order,
    )
    f, grad_f = jax.value_and_grad(ctx.loss)(params, retain, rng_retain)
    (collapse, h), grad_collapse = collapse_after(params)
    grads = tree.add_scale(grad_f, hp.lam, grad_collapse)
    return grads, {"loss/retain": f, "loss/harmful": h, "loss/collapse": collapse}


def look_ahead(
    attacked, judged, *, alpha, normalize: bool = True, second_order: bool = False
):
    """`params -> ((judged after one step on attacked, attacked), gradient)`."""

    def step(params):
        value, grad = jax.value_and_grad(attacked)(params)
        move = tree.normalize(grad) if normalize else grad
        return tree.add_scale(tree.wide(params), -alpha, move), value

    def after(params):
        if second_order:

            def total(w):
                tampered, value = step(w)
                return judged(tampered), value

            return jax.value_and_grad(total, has_aux=True)(params)
        tampered, value = step(params)
        judgement, grad = jax.value_and_grad(judged)(tampered)
        return (judgement, value), grad

    return after


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_CODE = Hparams(
    optimizers.Optimizer(5e-4, weight_decay=0.1),
    adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
)

PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_ALIGNMENT, lam=0.1)),
    "code": plans.Plan(
        _CODE, batch_size=10, epochs=20, source="clearloveclearlove/CTRAP bb0f07e"
    ),
    "survey": plans.Plan(
        _CODE, batch_size=10, epochs=20, source="arXiv:2605.14605, Table 6"
    ),
}
