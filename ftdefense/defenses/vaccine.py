"""Vaccine: align under the worst small shift of every layer's attention output.

Stage        alignment.
Template     T1 basin
Strategy     anchoring
Minimises    max over shifts e, ||e|| <= rho, of L(alignment) with attn_l + e_l in every
             layer l; linearised: e = rho * g / ||g||, g the gradient of L with respect
             to the shifts at zero, one norm over layers, tokens and batch; the gradient
             stops at e, and there is no clean term.
Source       Huang et al. 2024, arXiv:2402.01109; code read at git-disl/Vaccine 8937f68.
Evidence     CODE for the rule and the presets; UNVERIFIED which rho the paper's main
             tables use (README and code: 2).
Licence      Apache-2.0
Differs      LoRA dropout, where on, uses two keys as in the code; gradient
             accumulation is exact here (the code keeps the last part only).
Reduces to   SFT on the alignment data at rho = 0, exactly.
Cost         2 forwards, 2 backwards, the first of activations only.
"""

from flax import struct
import jax

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.methods import shifts

SITES = ("attn", "resid")  # The code's; the residual after each block.
NULL = {"rho": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    rho: float = 2.0  # Length of the shift, L2 over layers, tokens and batch.
    site: str = struct.field(pytree_node=False, default="attn")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.site not in SITES:
        raise errors.unknown("vaccine.site", hp.site, SITES)
    return {"alignment": ()}


def direction(ctx, params, batches, rng):
    batch, site = batches["alignment"], ctx.hp.site
    rng_clean, rng_shifted = jax.random.split(rng)
    clean, gradient_NxBxLxD = shifts.gradient(ctx, params, batch, rng_clean, site)
    shift_NxBxLxD = ctx.hp.rho * tree.normalize(gradient_NxBxLxD)
    shifted, grads = shifts.value_and_grad(
        ctx, params, batch, rng_shifted, site, shift_NxBxLxD
    )
    return grads, {
        "loss/alignment": clean,
        "loss/shifted": shifted,
        "norm/shift": tree.norm(shift_NxBxLxD),
    }


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_COSINE = schedules.Schedule(warmup_ratio=0.1, decay="cosine")
_LORA = adapters.LoRA(alpha=4.0, dropout=0.1, rank=8)

PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_ALIGNMENT, rho=10.0)),
    "code": plans.Plan(
        Hparams(optimizers.Optimizer(1e-3, _COSINE, weight_decay=0.1), _LORA),
        batch_size=5,
        epochs=50,
        source="git-disl/Vaccine 8937f68, script/alignment/Vaccine.sh",
    ),
    "booster_repo": plans.Plan(
        Hparams(
            optimizers.Optimizer(5e-4, weight_decay=0.1),
            adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
            rho=5.0,
        ),
        batch_size=10,
        epochs=20,
        source="git-disl/Booster 6421918",
    ),
    "survey": plans.Plan(
        Hparams(optimizers.Optimizer(1e-3, _COSINE, weight_decay=0.1), _LORA, rho=1.0),
        batch_size=5,
        epochs=50,
        source="arXiv:2605.14605, Table 6; its schedule is the code's (INF)",
    ),
}
