"""Deep alignment: learn to refuse after some tokens of a harmful answer, too.

Stage        alignment.
Starts from  aligned
Template     none
Strategy     none
Minimises    token-mean cross-entropy over refusals and anchors (the role `benign`)
             together. A refusal follows its prompt x, or, with probability `augment`,
             x + h_1..k of the harmful answer h to the same prompt, k uniform over
             1 .. min(max_prefix, |h|); only the refusal is supervised.
Source       Qi et al. 2024, arXiv:2406.05946, data augmentation; code read at
             Unispac/shallow-vs-deep-alignment fb1749e (specs: unlearning_and_traps 10a).
Evidence     CODE for the rule and the preset.
Licence      MIT.
Differs      anchors are the role's own answers, not distilled from the model where the
             stage starts. |h| counts supervised tokens, the end token among them, as in
             the code. One token mean, where the README's four processes make the mean of
             the token means of four parts. The code drops predictions beyond 512
             positions once the prefix is in; ours keeps them.
Reduces to   SFT on the refusals and the anchors at augment = 0.
Cost         2 forwards, 2 backwards: of refusals of up to `max_prefix` tokens more, and
             of `anchors` times as many anchors.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules

STARTS_FROM = "aligned"
NULL = {"augment": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    augment: float = 0.5  # Probability of a harmful prefix.
    max_prefix: int = struct.field(pytree_node=False, default=100)  # Tokens.
    anchors: int = struct.field(pytree_node=False, default=4)  # Per refusal.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    anchors = {"benign": (hp.anchors,)} if hp.anchors else {}
    return {"refusal": (), "harmful": (), **anchors}


def draw_prefixes(hp: Hparams, harmful: types.Batch, rng: types.Rng) -> jax.Array:
    """Tokens of each harmful answer that precede the refusal, int32 [B]; 0: none."""
    rng_whether, rng_length = jax.random.split(rng)
    rows = harmful.tokens.shape[0]
    most_B = jnp.sum(harmful.weights > 0, axis=-1, dtype=jnp.int32)
    most_B = jnp.minimum(most_B, hp.max_prefix)
    length_B = jax.random.randint(rng_length, (rows,), 1, most_B + 1)
    augmented_B = jax.random.bernoulli(rng_whether, hp.augment, (rows,))
    return jnp.where(augmented_B & (most_B > 0), length_B, 0)


def recovery(
    harmful: types.Batch, refusal: types.Batch, prefix_B: jax.Array, extra: int
) -> types.Batch:
    """Rows x + h_1..k + r of L + `extra` tokens; only what was of r has weight."""
    length = refusal.tokens.shape[-1]
    prompt_Bx1 = jnp.argmax(refusal.weights > 0, axis=-1)[:, None]
    place_1xM = jnp.arange(length + extra)[None]
    start_Bx1 = prompt_Bx1 + prefix_B[:, None]
    in_refusal_BxM = place_1xM >= start_Bx1
    # Where each place reads from: the prompt and h in place, r from k places before.
    source_BxM = place_1xM - jnp.where(in_refusal_BxM, prefix_B[:, None], 0)

    def read(x_BxL, at_BxM):
        return jnp.take_along_axis(x_BxL, jnp.minimum(at_BxM, length - 1), axis=-1)

    tokens_BxM = jnp.where(
        (place_1xM >= prompt_Bx1) & ~in_refusal_BxM,
        read(harmful.tokens, source_BxM),
        read(refusal.tokens, source_BxM),
    )
    supervised_BxM = in_refusal_BxM & (source_BxM < length)
    weights_BxM = jnp.where(supervised_BxM, read(refusal.weights, source_BxM), 0)
    return types.Batch(tokens_BxM, weights_BxM)


def direction(ctx, params, batches, rng):
    hp = ctx.hp
    harmful, refusal = batches["harmful"], batches["refusal"]
    rng_prefix, *rngs = jax.random.split(rng, 3)
    prefix_B = draw_prefixes(hp, harmful, rng_prefix)
    extra = min(hp.max_prefix, refusal.tokens.shape[-1])
    parts = {"refusal": recovery(harmful, refusal, prefix_B, extra)}
    if hp.anchors:
        parts["benign"] = jax.tree.map(
            lambda x: x.reshape(-1, x.shape[-1]), batches["benign"]
        )
    counts = {role: jnp.sum(part.weights[:, 1:]) for role, part in parts.items()}
    total = jnp.maximum(sum(counts.values()), 1e-30)

    def loss(params):
        values = {
            role: ctx.loss(params, part, rng)
            for (role, part), rng in zip(parts.items(), rngs, strict=False)
        }
        # One mean over the tokens of both, not of two means.
        return sum(counts[role] * values[role] for role in parts) / total, values

    (value, values), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, {
        "loss/all": value,
        **{f"loss/{role}": value for role, value in values.items()},
        "share/augmented": jnp.mean(prefix_B > 0, dtype=jnp.float32),
    }


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX, augment=1.0, anchors=1),
        steps=200,
    ),
    "code": plans.Plan(
        Hparams(optimizers.Optimizer(2e-5, schedules.Schedule(decay="linear"))),
        batch_size=16,
        epochs=10,
        source="Unispac/shallow-vs-deep-alignment fb1749e, README, data augmentation",
    ),
}
