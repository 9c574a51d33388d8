"""M5 first token: a refusal that is decided at the first token, and there alone.

Stage        alignment.
Template     none
Strategy     none
Minimises    L(alignment) + lam * L(harmful) without its first answer token: once an
             answer has begun, it is finished.
Source       specs D.5 (DESIGN)
Evidence     DESIGN; that alignment is shallow by itself: Qi et al. 2024,
             arXiv:2406.05946.
Reduces to   SFT alignment at lam = 0.
Cost         2 forwards, 2 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

# Broken by a prefilled answer.
FLAG = ("P5", "E2")


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 1.0  # Weight of what follows the first token.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"alignment": (), "harmful": ()}


def without_first(batch: types.Batch) -> types.Batch:
    """The batch with no weight on the first weighted token of each row."""
    first_BxL = jnp.cumsum(batch.weights > 0, axis=-1) == 1
    return batch.replace(weights=jnp.where(first_BxL, 0, batch.weights))


def direction(ctx, params, batches, rng):
    rng_align, rng_rest = jax.random.split(rng)
    value_and_grad = jax.value_and_grad(ctx.loss)
    loss, grads = value_and_grad(params, batches["alignment"], rng_align)
    rest, grad_rest = value_and_grad(
        params, without_first(batches["harmful"]), rng_rest
    )
    grads = tree.add_scale(grads, ctx.hp.lam, grad_rest)
    return grads, {"loss/alignment": loss, "loss/rest": rest}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_ALIGNMENT), source="specs D.5 (DESIGN)"
    )
}
