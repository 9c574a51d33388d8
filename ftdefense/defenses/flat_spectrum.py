"""Flat spectrum: fine-tune low-rank factors whose product stretches no direction most.

Stage        fine_tuning; the provider trains an adapter on the user's rows.
Template     none
Strategy     none
Minimises    L(user) + lam * the mean over adapted kernels of ||B A||_F / ||B A||_* -
             1 / sqrt(r): 0 where all r singular values are equal, 1 - 1 / sqrt(r) for
             rank one. The scale of B A does not count.
Source       "Evil Spectra", arXiv:2606.31591 (specs/attacks.md B.7): the concentration of
             an adapter's spectrum goes with misalignment, and so with the optimizer.
Evidence     FT for the term, lam = 3 and the preset, where it raised alignment under
             adaptive optimizers and lowered it slightly under SGD; UNVERIFIED: a mean
             over kernels, no term at B = 0. A candidate, nobody's published defense.
Licence      the term alone: written from the formula.
Differs      nothing else known.
Reduces to   SFT on user at lam = 0, exactly, and at rank 1.
Cost         1 forward, 1 backward; two QR and one SVD of r x r for each kernel.
"""

from flax import struct
import jax

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import spectra


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 3.0  # Weight of the concentration, in nats.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if not isinstance(hp.adapter, adapters.LoRA):
        raise errors.UserError(
            "flat_spectrum is about low-rank factors; set flat_spectrum.adapter=lora."
        )
    return {"user": ()}


def direction(ctx, params, batches, rng):
    loss, grads = jax.value_and_grad(ctx.loss)(params, batches["user"], rng)
    uneven, steer = jax.value_and_grad(spectra.mean_concentration)(params)
    grads = jax.tree.map(lambda g, s: g + ctx.hp.lam * s, grads, steer)
    return grads, {"loss/user": loss, "concentration/adapter": uneven}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(
            optimizers.SANDBOX_TUNING.replace(learning_rate=4e-4),
            adapters.LoRA(alpha=32.0, rank=16),
        ),
        source="DESIGN: BUILD_NOTES.md, Sandbox presets; lam as published",
    ),
    "paper": plans.Plan(
        Hparams(
            optimizers.Optimizer(
                1e-5, schedules.Schedule(warmup_ratio=0.1, decay="cosine")
            ),
            adapters.LoRA(alpha=64.0, rank=32, rank_stabilised=True),
        ),
        batch_size=32,
        epochs=1,
        source="arXiv:2606.31591: specs/attacks.md B.7; 50 warm-up steps there, as a tenth",
    ),
}
