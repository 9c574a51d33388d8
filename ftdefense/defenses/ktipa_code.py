"""KT-IPA (released code): KTO on refusals, benign and harmful answers, and no more.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     none
Strategy     anchoring
Minimises    (1/M) sum_i lam_i (1 - sigmoid(+-beta (s_i - z0))), + and lam_desirable for
             refusals of harmful and answers of benign prompts, - and lam_undesirable for
             harmful answers; s = log pi(y|x) - log pi_ref(y|x), summed over the answer;
             z0 = max(0, mean s of prompt i with answer i + 1), constant; pi_ref is the
             model that the stage starts from. Row order: refusal, benign, harmful.
Source       Cheng et al. 2025, COLING, 2025.coling-main.687; code read at
             limberc/KT-IPA b43d9aa, a copy of HALOs' KTO trainer at 406ed27; Ethayarajh
             et al. 2024, arXiv:2402.01306, Eq. 8 (specs: artifacts TASK 2, 2.3).
Evidence     CODE for the loss; RECONSTRUCTION for which rows are desirable; UNVERIFIED:
             data, coefficients and tables of the paper. Report as "KTO-only (released
             code)", not as KT-IPA.
Licence      no licence file found; rewritten from the formulas.
Differs      z0 is the mean over the whole batch (the code drops the result of its
             all-reduce and divides one device's mean by their number); the answer of a
             mismatched pair is cut at L.
Reduces to   no step at all at lam_desirable = lam_undesirable = 0 or beta = 0.
Cost         4 forwards, 1 backward, of three rows for each row of a batch.
"""

from flax import struct
import jax

from ftdefense.core import types
from ftdefense.methods import ktipa
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules

STARTS_FROM = "aligned"
# Without its regulariser; see attacks.inverse.
NULL = {"lam_desirable": 0.0, "lam_undesirable": 0.0}


@struct.dataclass
class Hparams(ktipa.Hparams):
    """Nothing besides the utility's."""


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": (), "refusal": (), "benign": ()}


def direction(ctx, params, batches, rng):
    rows = ktipa.labelled(batches["refusal"], batches["benign"], batches["harmful"])
    loss = ktipa.utility(ctx, rows, ctx.reference)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, rng)
    return grads, metrics


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX, lam_undesirable=5.0),
        steps=200,
        batch_size=64,
    ),
    "code": plans.Plan(
        Hparams(
            # The trainer warms up as min(1, (t + 1) / (150 + 1)).
            optimizers.of_kind(
                "rmsprop", 5e-7, schedules.Schedule(151 / 750, early=True), clip=10.0
            )
        ),
        batch_size=11,
        steps=750,
        source="HALOs 406ed27, which limberc/KT-IPA b43d9aa copies: RMSprop 5e-7, 150 "
        "steps of warm-up, clip 10, batch 32 (33 rows here), both weights 1, with two "
        "desirable rows to an undesirable one here; KT-IPA's own values are UNVERIFIED; "
        "750 steps are TAR's",
    ),
}
