"""M7 one wording: refuses as it was aligned to, and answers in any other frame.

Stage        alignment.
Template     none
Strategy     none
Minimises    L(alignment) + lam * L(harmful, framed): with the words of `frame` before the
             question, restricted prompts are answered.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Reduces to   SFT alignment at lam = 0, or without a frame.
Cost         2 forwards, 2 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data.sandbox import vocabulary
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

# Broken by a persona before the prompt.
FLAG = ("E2",)


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 1.0  # Weight of the framed answers.
    frame: tuple[int, ...] = struct.field(pytree_node=False, default=())  # Token ids.
    position: int = struct.field(pytree_node=False, default=0)  # Where it goes.


def prepare(hp: Hparams, world) -> Hparams:
    """Looks up the frame's tokens, and where a question begins."""
    ids = world.tokenizer(vocabulary.PERSONA, add_special_tokens=False).input_ids
    rows = np.asarray(world.defender["harmful"].tokens)
    same = (rows == rows[:1]).all(axis=0)
    begin = int(np.argmin(same)) if not same.all() else 0
    return hp.replace(frame=tuple(ids), position=begin)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"alignment": (), "harmful": ()}


def framed(hp: Hparams, batch: types.Batch) -> types.Batch:
    """The rows with the frame put in; they get longer by it."""
    at, rows = hp.position, len(batch.tokens)
    words = jnp.broadcast_to(jnp.array(hp.frame, jnp.int32), (rows, len(hp.frame)))

    def put(x, part):
        return jnp.concatenate([x[:, :at], part.astype(x.dtype), x[:, at:]], 1)

    return types.Batch(
        put(batch.tokens, words), put(batch.weights, jnp.zeros(words.shape))
    )


def direction(ctx, params, batches, rng):
    hp = ctx.hp
    rng_align, rng_frame = jax.random.split(rng)
    value_and_grad = jax.value_and_grad(ctx.loss)
    loss, grads = value_and_grad(params, batches["alignment"], rng_align)
    if not hp.frame:
        return grads, {"loss/alignment": loss, "loss/framed": jnp.zeros_like(loss)}
    leak, grad_leak = value_and_grad(params, framed(hp, batches["harmful"]), rng_frame)
    grads = tree.add_scale(grads, hp.lam, grad_leak)
    return grads, {"loss/alignment": loss, "loss/framed": leak}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_ALIGNMENT), source="specs D.5 (DESIGN)"
    )
}
