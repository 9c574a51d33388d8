"""RepNoise: make the hidden states of harmful answers noise, in every layer.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T2 purge
Strategy     anchoring
Minimises    S + beta * (1/N) sum_l MMD(m * mlp_l, m * z_l) - alpha * ln A on row-paired
             harmful and refusal texts: S the refusal's cross-entropy, mlp_l the output
             of layer l's MLP on the harmful text (a row is one vector of L * D), z_l
             fresh Gaussian noise, A = 1 + (CE_final + sum_l CE_l) / (N + 1) the logit
             lens of the harmful text, m where the pair's tokens differ.
Source       Rosati et al. 2024, arXiv:2405.14577; code read at
             domenicrosati/representation-noising 03689ff (specs: unlearning 1).
Evidence     CODE, its quirks kept with mask = "divergence": the first diverging token
             costs ln V without a gradient; id 0 is never a target; the lens norms the
             last, normed state again; N + 2 terms over N + 1. UNVERIFIED: the tables.
Licence      Apache-2.0
Differs      mask = "response" is the durability paper's correction (answer weights, all
             real tokens noised). `rehearse` adds SFT on benign rows, which a small model
             needs. Without a target a term is 0, not NaN.
Reduces to   SFT on the refusals (under the mask) at alpha = beta = 0.
Cost         2 forwards, 2 backwards (3, 3 with `rehearse`); of N + 1 readouts 2, 1.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import microbatching
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import distances
from ftdefense.objectives import lens

STARTS_FROM = "aligned"
NULL = {"alpha": 0.0, "beta": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    alpha: float = 1.0  # Weight of the ascent ln A.
    beta: float = 1e-3  # Weight of the noise term.
    mask: str = struct.field(pytree_node=False, default="divergence")
    rehearse: bool = struct.field(pytree_node=False, default=False)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    microbatching.refuse(hp, "repnoise")
    roles = ("harmful", "refusal", "benign") if hp.rehearse else ("harmful", "refusal")
    return {role: () for role in roles}


def direction(ctx, params, batches, rng):
    hp, harmful, refusal = ctx.hp, batches["harmful"], batches["refusal"]
    rng_harmful, rng_refusal, rng_benign, rng_noise = jax.random.split(rng, 4)
    wanted = lens.targets(refusal, harmful, hp.mask)
    unwanted = lens.targets(harmful, refusal, hp.mask)
    all_real = hp.mask == "response"
    mask_BxL = (
        distances.attended(harmful) if all_real else lens.divergence(harmful, refusal)
    )

    def loss(w):
        outputs = ctx.model(
            w, harmful.tokens, rng=rng_harmful, attended=distances.attended(harmful)
        )
        noise = distances.to_noise(outputs.hidden["mlp"], mask_BxL, rng_noise)
        ascent = jnp.log(lens.ascent(ctx.readout, w, outputs, unwanted))
        kept = ctx.model(
            w, refusal.tokens, rng=rng_refusal, attended=distances.attended(refusal)
        )
        stability = lens.cross_entropy(kept.logits, wanted)
        total = stability + hp.beta * noise - hp.alpha * ascent
        metrics = {
            "loss/refusal": stability,
            "loss/harmful": lens.cross_entropy(outputs.logits, unwanted),
            "distance/noise": noise,
            "ascent/harmful": ascent,
        }
        if hp.rehearse:
            metrics["loss/benign"] = ctx.loss(w, batches["benign"], rng_benign)
            total = total + metrics["loss/benign"]
        return total, metrics

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_COSINE = schedules.Schedule(warmup_ratio=0.1, decay="cosine")

PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX, mask="response", rehearse=True),
        steps=200,
    ),
    "code": plans.Plan(
        Hparams(optimizers.Optimizer(2e-5, _COSINE, clip=float("inf"))),
        batch_size=8,
        epochs=1,
        source="boyiwei/RepNoise-Reproduce 4f6572d, defaults of the original runs",
    ),
}
