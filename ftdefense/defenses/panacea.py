"""Panacea: learn where a small shift hurts harmful answers, and shift there at the end.

Stage        fine_tuning; the provider trains on the user's rows and perturbs the result.
Template     T3 look-ahead
Strategy     none
Minimises    L(user; w) - lam * (min(h(w + eps), cap) - h(w)), with h the harmful loss
             and eps = rho * grad h(w) / ||grad h(w)||, through which no gradient passes;
             beyond `cap` the look-ahead has none either. Releases w + post * eps, eps of
             the last step.
Source       Wang et al. 2025, arXiv:2501.18100; code read at w-yibo/Panacea d17b2db
             (specs: defenses_unlearning_and_traps 12.4).
Evidence     CODE, which as shipped does not run; its script asks for the final shift.
Licence      no licence file found; rewritten from the formulas.
Differs      eps is a tree of its own, in float32, no alias of the gradients. With LoRA,
             the shift is one of the factors, as in the code; but the code goes on with
             the alignment's adapter, whose B is not 0, and here a fresh one starts.
Reduces to   SFT on user at lam = post = 0, and at rho = 0 below the cap, exactly; SFT and
             then the final shift at lam = 0.
Cost         3 forwards, 3 backwards; a float32 copy of what trains.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 0.001  # Weight of the gained harmful loss; lambda in the paper.
    rho: float = 1.0  # Length of the perturbation, L2 over all that trains.
    cap: float = 5.0  # Nats of harmful loss beyond which nothing more is gained.
    post: float = 1.0  # Multiple of the last perturbation that is released.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    # The first role counts the epochs: they are the user's.
    return {"user": (), "harmful": ()}


def memory(ctx, params, rng):
    """The last perturbation; none yet."""
    del ctx, rng
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params
    )


def direction(ctx, params, batches, rng, last):
    hp, value_and_grad = ctx.hp, jax.value_and_grad(ctx.loss)
    rng_user, rng_harmful = jax.random.split(rng)
    loss, grads = value_and_grad(params, batches["user"], rng_user)
    h, grad_h = value_and_grad(params, batches["harmful"], rng_harmful)
    eps = jax.tree.map(
        lambda x, g: (hp.rho * g).astype(x.dtype), last, tree.normalize(grad_h)
    )
    shifted = tree.add_scale(tree.wide(params), 1.0, eps)
    h_after, grad_after = value_and_grad(shifted, batches["harmful"], rng_harmful)
    gain = jax.tree.map(
        lambda after, now: jnp.where(h_after <= hp.cap, after, 0) - now,
        grad_after,
        grad_h,
    )
    return (
        tree.add_scale(grads, -hp.lam, gain),
        {
            "loss/user": loss,
            "loss/harmful": h,
            "gain/harmful": h_after - h,
            "norm/perturbation": tree.norm(eps),
        },
        eps,
    )


def method(model: types.Model) -> types.Method:
    trained = lift.remembering_method(model, direction, streams, memory)

    def release(state: lift.TrainState, lineage: types.Lineage) -> types.Release:
        shifted = tree.add_scale(state.params, state.hp.post, state.memory)
        return trained.release(state.replace(params=shifted), lineage)

    return trained._replace(release=release)


_CODE = plans.Plan(
    Hparams(
        optimizers.Optimizer(2e-5, weight_decay=0.1),
        adapters.LoRA(alpha=4.0, rank=32, targets=adapters.ATTENTION),
    ),
    batch_size=10,
    epochs=20,
    source="w-yibo/Panacea d17b2db, train.py and panacea_gsm8k.sh, which shifts at the "
    "end (--tag eps; add_eps is True by default); the paper's numbers are UNVERIFIED",
)

PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_TUNING, rho=0.003)),
    "paper": _CODE,
    "code": _CODE,
}
