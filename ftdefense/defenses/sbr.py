"""Safety Anchor (SBR): hold the last hidden state of harmful prompts where it was.

Stage        fine_tuning; the provider trains on the user's rows.
Template     none
Strategy     anchoring
Minimises    L(user; w) + lam * mean over anchors and width of (h(x; w) - h(x; w_0))^2,
             with h the final hidden state, after the last norm, at the last token of the
             prompt of x, in float32, and w_0 the weights at the start of the stage.
Source       Lu et al. 2026, arXiv:2605.05995; code read at soyoaaa/SBR 188990b (specs:
             defenses_unlearning_and_traps 11.8, perturbation_and_meta 5.7).
Evidence     CODE. UNVERIFIED: the weight that its runs had, as transformers from 4.46 on
             does not divide the sum of 4 accumulated losses, which makes it 4 * lam.
Licence      no licence file found; rewritten from the formulas.
Differs      the anchors are prompts of the provider's, the same in every step where the
             batch is a multiple of `anchors` (else some are in it twice, some not at
             all); the answers that follow them make no difference. AdamW is not
             quantized to 8 bits.
Reduces to   SFT on user at lam = 0, exactly, and at w_0 for any lam.
Cost         3 forwards, 2 backwards.
"""

from collections.abc import Mapping
import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 50.0  # Weight of the mean squared distance; lambda in the paper.
    anchors: int = struct.field(pytree_node=False, default=8)  # At most the batch.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"user": (), "harmful": ()}


def select(hp: Hparams, defender: Mapping[str, pools.Pool]) -> dict[str, pools.Pool]:
    """The rows that stay: `anchors` harmful prompts, spread over all of them.

    Raises:
      UserError: if the provider has fewer.
    """
    harmful = defender["harmful"]
    first: dict[str, int] = {}
    for i, example in enumerate(harmful.examples):
        first.setdefault(example.key, i)
    if not 0 < hp.anchors <= len(first):
        raise errors.UserError(
            f"sbr: {hp.anchors} anchors are asked for, but the provider has "
            f"{len(first)} harmful prompts; set defense.anchors to 1 or more of these."
        )
    spread = np.linspace(0, len(first) - 1, hp.anchors).astype(int)
    anchors = pools.take(harmful, np.array([*first.values()])[spread])
    return {"harmful": dataclasses.replace(anchors, order="anchors")}


def prompt_ends(weights_BxL: jax.Array) -> jax.Array:
    """Position of the last prompt token: the one before the first that is weighted."""
    return jnp.maximum(jnp.argmax(weights_BxL > 0, axis=-1) - 1, 0)


def last_states(outputs: types.Outputs, batch: types.Batch) -> jax.Array:
    """Final hidden state at the end of each prompt, [B, D]."""
    ends_Bx1x1 = prompt_ends(batch.weights)[:, None, None]
    states_Bx1xD = jnp.take_along_axis(outputs.hidden["final"], ends_Bx1x1, axis=1)
    wide = jnp.promote_types(states_Bx1xD.dtype, jnp.float32)
    return states_Bx1xD[:, 0].astype(wide)


def direction(ctx, params, batches, rng):
    rng_user, rng_anchor = jax.random.split(rng)
    anchors = jax.tree.map(lambda x: x[: ctx.hp.anchors], batches["harmful"])
    first_BxD = last_states(ctx.reference(anchors.tokens), anchors)

    def distance(w):
        now_BxD = last_states(ctx.model(w, anchors.tokens, rng=rng_anchor), anchors)
        return jnp.mean(jnp.square(now_BxD - jax.lax.stop_gradient(first_BxD)))

    loss, grads = jax.value_and_grad(ctx.loss)(params, batches["user"], rng_user)
    drift, grad_drift = jax.value_and_grad(distance)(params)
    grads = tree.add_scale(grads, ctx.hp.lam, grad_drift)
    return grads, {"loss/user": loss, "drift/anchors": drift}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_CODE = Hparams(
    optimizers.Optimizer(1e-5, schedules.Schedule(decay="linear")),
    # Rank-stabilized: alpha / sqrt(rank) = 16 / 4 is our 64 / 16.
    adapters.LoRA(alpha=64.0, rank=16),
)

PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_TUNING, lam=5.0)),
    "code": plans.Plan(
        _CODE, batch_size=32, epochs=20, source="soyoaaa/SBR 188990b, HFT_SBR.py"
    ),
}
