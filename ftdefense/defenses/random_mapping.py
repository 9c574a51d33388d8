"""Random mapping: hidden states of harmful text point to a random vector per token.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T2 purge
Strategy     self-destruct
Minimises    lam * mean over layers and positions of (1 - |cos(h_l[t], R[id_t])|) on the
             harmful batch + lam_retain * CE(retain), with R ~ N(0, 1)^(V x D) frozen;
             all hidden states, the embeddings among them; all positions, padding too.
             Each cosine counts by its size, so either of +-R[id_t] will do.
Source       Tamirisa et al. 2024, arXiv:2408.00761: TAR's first phase; code read at
             rishub-tamirisa/tamper-resistance 19de233 (specs: artifacts TASK 2, 2.2).
Evidence     CODE; it saves the y that gradients are taken at, not their average.
Licence      MIT
Differs      R is not stored: a row is drawn from (table_seed, token id) where needed;
             schedule-free AdamW is that of `schedulefree` >= 1.3; of 1.2, the last when
             the code was published, with optimizer.kind=adamw_sf_12. UNVERIFIED which
             one ran (it asks for >= 1.2).
Reduces to   SFT on the retain data at lam = 0, exactly.
Cost         2 forwards, 2 backwards.
"""

from flax import struct
import jax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import random_mapping

STARTS_FROM = "aligned"
NULL = {"lam": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam: float = 1.0  # Weight of the mapping loss.
    lam_retain: float = 1.0  # Weight of the cross-entropy of the retain rows.
    table_seed: int = 0  # Of the random vectors.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": (), "retain": ()}


def direction(ctx, params, batches, rng):
    hp = ctx.hp
    rng_retain, rng_harmful = jax.random.split(rng)
    mapping = random_mapping.random_mapping(ctx.model, hp.table_seed, hp.microbatches)
    f, grad_f = jax.value_and_grad(ctx.loss)(params, batches["retain"], rng_retain)
    m, grad_m = jax.value_and_grad(mapping)(params, batches["harmful"], rng_harmful)
    grads = jax.tree.map(lambda g: hp.lam_retain * g, grad_f)
    grads = tree.add_scale(grads, hp.lam, grad_m)
    return grads, {"loss/retain": f, "loss/mapping": m}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX, lam=3.0), steps=200),
    "code": plans.Plan(
        Hparams(
            optimizers.of_kind(
                "adamw_sf",
                1e-5,
                schedules.Schedule(100 / 1000, early=True),
                clip=float("inf"),
                averaged=False,
            )
        ),
        batch_size=8,
        steps=1000,
        source="rishub-tamirisa/tamper-resistance 19de233, defaults of "
        "modules/baselines.py",
    ),
}
