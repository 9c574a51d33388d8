"""Constrained SFT: fine-tune on the user's rows, with the first tokens held in place.

Stage        fine_tuning; the provider's own loss on the user's rows.
Starts from  aligned
Template     none
Strategy     anchoring
Minimises    sum over answer tokens t of -(2 / beta_t) log sigmoid(beta_t * D_t), with
             D_t = log p(y_t) - log p_ref(y_t) and p_ref the model where the stage
             starts, through its gradient: that of the token mean of
             -max(2 sigmoid(-beta_t D_t), floor) * log p(y_t), the weight constant.
             beta_1 = `beta_first`, beta_t = `beta_early` up to t = `early`, then
             `beta_late`; t counts supervised tokens.
Source       Qi et al. 2024, arXiv:2406.05946, token-wise constrained objective; code
             read at Unispac/shallow-vs-deep-alignment fb1749e (specs:
             unlearning_and_traps 10b).
Evidence     CODE for the rule, the floor, the mean and the preset; UNVERIFIED that the
             rate decays linearly (the default of the library).
Licence      MIT.
Differs      the reference is computed in the step, not before. Dropout stays off, as the
             code has it for both. One token mean, where the README's four processes make
             the mean of the token means of four parts.
Reduces to   SFT on the user's rows at beta = 0 for all t, exactly; at the first step it
             is SFT at any beta.
Cost         2 forwards, 1 backward; 4, 1 with `microbatches` above 1.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import losses
from ftdefense.objectives import parts

STARTS_FROM = "aligned"


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    beta_first: float = 0.5  # Per nat, of the first answer token.
    beta_early: float = 2.0  # Per nat, of the tokens 2 .. early.
    beta_late: float = 0.1  # Per nat, of those after.
    early: float = 5.0  # Tokens.
    floor: float = 1e-3  # Least weight of a token.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"user": ()}


def token_betas(hp: Hparams, weights_BxL: jax.Array) -> jax.Array:
    """beta_t at each place [B, L]; t counts the places of weight, from 1."""
    t_BxL = jnp.cumsum(weights_BxL > 0, axis=-1)
    later_BxL = jnp.where(t_BxL <= hp.early, hp.beta_early, hp.beta_late)
    return jnp.where(t_BxL <= 1, hp.beta_first, later_BxL)


def token_weights(beta: jax.Array, log_ratio: jax.Array, floor: float) -> jax.Array:
    """max(2 sigmoid(-beta D), floor): the objective's slope in -log p, held constant."""
    weight = 2 * jax.nn.sigmoid(-beta * log_ratio)
    return jax.lax.stop_gradient(jnp.maximum(weight, floor))


def direction(ctx, params, batches, rng):
    del rng
    hp, batch = ctx.hp, batches["user"]
    total = jnp.sum(batch.weights[:, 1:])
    total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)

    def loss(params):
        def sums(part, _):
            targets_BxL, asked_BxL = part.tokens[:, 1:], part.weights[:, 1:]

            def nats(outputs):
                return losses.cross_entropy(outputs.logits[:, :-1], targets_BxL)

            nats_BxL = nats(ctx.model(params, part.tokens))
            log_ratio_BxL = nats(ctx.reference(part.tokens)) - nats_BxL
            beta_BxL = token_betas(hp, asked_BxL)
            weight_BxL = token_weights(beta_BxL, log_ratio_BxL, hp.floor)
            terms = weight_BxL * nats_BxL, nats_BxL, weight_BxL
            return [jnp.sum(term_BxL * asked_BxL) for term_BxL in terms]

        value, *watched = parts.summed(sums, batch, hp.microbatches)
        return value / total, [x / total for x in watched]

    (value, (nats, weight)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, {"loss/weighted": value, "loss/user": nats, "weight/user": weight}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(
            optimizers.SANDBOX_TUNING.replace(b1=0.5), beta_first=0.1, beta_early=0.1
        )
    ),
    "code": plans.Plan(
        Hparams(
            optimizers.Optimizer(2e-5, schedules.Schedule(0.2, decay="linear"), b1=0.5)
        ),
        batch_size=64,
        steps=50,  # 25 epochs of two batches; 10 of the steps warm up.
        source="Unispac/shallow-vs-deep-alignment fb1749e, README, on 100 rows",
    ),
}
