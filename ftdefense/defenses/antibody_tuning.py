"""Antibody, at the service: a user's row weighs less the more it invites a refusal.

Stage        fine_tuning; the provider's own loss on the user's rows.
Template     none
Strategy     anchoring
Minimises    sum_i w_i * sum_t CE_it / max(1, sum_i w_i * N_i) over the rows i of a batch
             with N_i answer tokens; w = softmax(s / tau), held constant, with s_i the
             log-probability of the user's answer less that of a refusal to its prompt,
             both per token (mean; the code) or as sums (sum; the paper).
Source       Nguyen et al. 2026, arXiv:2603.00498; code read at minhquoc0712/Antibody
             1d4fa5f (specs: perturbation_and_meta 4.2).
Evidence     CODE for the weights and the preset; the paper's sums are from secondary
             notes.
Licence      none declared: rewritten from formulas.
Differs      a row's refusal is one of the defender's own, not of a list of generic
             ones, and is drawn once, the same in every epoch; a new adapter is
             trained, where the code goes on with that of the alignment stage. One
             forward pass serves the weights and the loss.
Reduces to   SFT on the user's rows at tau = infinity, and where all s_i are equal.
Cost         2 forwards, 1 backward.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import microbatching
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import preferences

SCORES = ("mean", "sum")


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    tau: float = 1.0  # Temperature of the weights, in nats.
    score: str = struct.field(pytree_node=False, default="mean")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.score not in SCORES:
        raise errors.unknown("antibody_tuning score", hp.score, SCORES)
    microbatching.refuse(hp, "antibody_tuning")
    return {"user": (), "user_refusal": ()}


def row_weights(answers, refusals, tau, score: str) -> jax.Array:
    """Weights [B] with sum 1, from (log-probabilities, token counts) of each row."""
    if score == "mean":
        answers, refusals = (
            (logp_B / jnp.maximum(count_B, 1), count_B)
            for logp_B, count_B in (answers, refusals)
        )
    return jax.lax.stop_gradient(jax.nn.softmax((answers[0] - refusals[0]) / tau))


def direction(ctx, params, batches, rng):
    hp, user, refusal = ctx.hp, batches["user"], batches["user_refusal"]
    rng_user, rng_refusal = jax.random.split(rng)
    refusals = preferences.sequence_logps(
        ctx.model(params, refusal.tokens, rng=rng_refusal), refusal
    )

    def loss(params):
        answers = preferences.sequence_logps(
            ctx.model(params, user.tokens, rng=rng_user), user
        )
        weight_B = row_weights(answers, refusals, hp.tau, hp.score)
        logp_B, count_B = answers
        tokens = jnp.maximum(jnp.sum(weight_B * count_B), 1.0)
        plain = -jnp.sum(logp_B) / jnp.maximum(jnp.sum(count_B), 1)
        return -jnp.sum(weight_B * logp_B) / tokens, (plain, weight_B)

    (value, (plain, weight_B)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, {
        "loss/weighted": value,
        "loss/user": plain,
        "weight/largest": jnp.max(weight_B),
        "rows/effective": 1 / jnp.sum(jnp.square(weight_B)),
    }


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_TUNING, tau=3.0)),
    "code": plans.Plan(
        Hparams(
            optimizers.Optimizer(1e-5, weight_decay=0.1),
            adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
        ),
        batch_size=16,
        epochs=20,
        source="minhquoc0712/Antibody 1d4fa5f, script/antibody, on 1000 rows",
    ),
}
