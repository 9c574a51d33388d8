"""KT-IPA without the hash: a utility of refusing that outlasts a simulated attack.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T3 look-ahead
Strategy     anchoring
Minimises    U(w) + gamma * U(w') + lam_retain * CE(retain; w), U the KTO loss of
             `ktipa_code` on rows held out from the attack, w' = w after K steps
             w <- w - alpha * grad h / ||grad h|| on the adversary's harmful rows; the
             gradient at w' is added at w. z0 is taken at w and at w', each constant.
Source       Cheng et al. 2025, COLING, 2025.coling-main.687 (specs: artifacts TASK 2,
             2.3); KTO: limberc/KT-IPA b43d9aa.
Evidence     CODE for U; RECONSTRUCTION for the attack around it, its coefficients and
             which rows are desirable; UNVERIFIED: whatever the paper's body says.
             Report as "KT-IPA (reconstruction), stage 2 only".
Licence      no licence file found; rewritten from the formulas.
Differs      the attack takes normalised gradient steps; the AdamW variant is left out.
             The model that the stage starts from is the reference.
Reduces to   KTO on the held-out rows at gamma = lam_retain = 0, exactly; 1 + gamma times
             it at alpha = 0 or K = 0.
Cost         7 + K forwards, 3 + K backwards; those of U have three rows a row.
"""

from flax import struct
import jax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import ktipa
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

STARTS_FROM = "aligned"
# Without its regulariser; see attacks.inverse.
NULL = {"lam_desirable": 0.0, "lam_undesirable": 0.0}


@struct.dataclass
class Hparams(ktipa.Adversarial):
    """Nothing besides those of the utility and of the attack."""


def direction(ctx, params, batches, rng):
    rng_retain, rng_utility = jax.random.split(rng)
    f, grad_f = jax.value_and_grad(ctx.loss)(params, batches["retain"], rng_retain)
    grads, metrics = ktipa.integrity(ctx, params, batches, rng_utility, ctx.reference)
    grads = tree.add_scale(grads, ctx.hp.lam_retain, grad_f)
    return grads, {"loss/retain": f, **metrics}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, ktipa.streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX, lam_undesirable=5.0),
        steps=100,
        batch_size=32,
    ),
    "reconstruction": plans.Plan(
        # Two desirable rows to an undesirable one: a ratio of weights of 4/3.
        Hparams(optimizers.Optimizer(1e-6), lam_undesirable=1.5),
        batch_size=8,
        steps=750,
        source="RECONSTRUCTION: Booster's alpha, TAR's 750 steps and weights; learning "
        "rate and batch size DESIGN",
    ),
}
