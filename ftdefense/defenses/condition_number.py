"""Condition number: harmful features that a linear probe learns from slowly.

Stage        alignment.
Template     none
Strategy     anchoring
Minimises    L(retain) + lam_retain * R_well(S_retain) + lam_harmful * R_ill(S_harmful),
             S = Phi' Phi of a batch's features, s_1 >= ... >= s_D its singular values:
             R_well = s_1^2 / 2 - ||S||_F^2 / (2 D), R_ill = 1 / (||S||_F^2 / (2 D) -
             s_D^2 / 2). S is the Hessian of least squares on the features.
Source       Zheng et al. 2025, arXiv:2505.23760, Algorithm 1; code read at
             amberyzheng/model-immunization-cond-num b749964 (specs:
             perturbation_and_meta 4.4).
Evidence     CODE for R_well and R_ill (jitter 1e-6 on the eigenvalues alone). DESIGN for
             language models, on which nothing was published: a feature is what the head
             reads at a position that predicts an answer token, so that the probe is the
             head; the subspace; the coefficients. R_well grows with the square of the
             number n of answer tokens in a batch, and R_ill falls with it: at another n
             keep lam_retain * n^2 and lam_harmful / n^2 (the code: 3e-6 and 3e8 for a
             ViT, 5e-5 and 2e6 for a ResNet-18, batches of 64 rows).
Licence      no licence file found; rewritten from the formulas.
Differs      D is the number of features (in the code the width of the input, 224 for
             images); the cross-entropy is not smoothed; no preconditioner, as for the
             code's deep networks; float32 where the model is, the code takes float64.
             AdamW on all weights, for SGD with Nesterov momentum on the last blocks.
             `subspace` > 0 takes the features along as many random directions, where a
             batch has fewer answer tokens than features: there s_D is the jitter.
Reduces to   SFT on the retain data at lam_retain = lam_harmful = 0, exactly.
Cost         2 forwards, 2 backwards; two eigendecompositions of D x D.
"""

import functools

from flax import struct
import jax

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import conditioning
from ftdefense.objectives import losses
from ftdefense.objectives import parts

# Without its regulariser; see attacks.inverse.
NULL = {"lam_retain": 0.0, "lam_harmful": 0.0}


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam_retain: float = 3e-10  # Weight of R_well, per (sum of squared features)^2.
    lam_harmful: float = 3e6  # Weight of R_ill, in (sum of squared features)^2.
    subspace_seed: int = 0  # Of the random directions.
    subspace: int = struct.field(pytree_node=False, default=0)  # 0: all features.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"retain": (), "harmful": ()}


def gram(hp: Hparams, outputs: types.Outputs, batch: types.Batch) -> jax.Array:
    """Of the features that predict answer tokens, [D, D] or of the subspace."""
    features_BxLxD = outputs.hidden["final"][:, :-1]
    width = features_BxLxD.shape[-1]
    if hp.subspace:
        basis_DxC = conditioning.subspace(width, hp.subspace, hp.subspace_seed)
        features_BxLxD = features_BxLxD @ basis_DxC.astype(features_BxLxD.dtype)
    return conditioning.gram(features_BxLxD, batch.weights[:, 1:])


def check_rows(hp: Hparams, width: int, batch: types.Batch) -> None:
    """Refuses batches whose Gram matrix must be singular."""
    rows, length = batch.tokens.shape
    wanted = hp.subspace or width
    if rows * (length - 1) < wanted or wanted > width:
        raise errors.UserError(
            f"condition_number: {rows} rows of {length} tokens cannot span {wanted} "
            f"features (the model has {width}); raise the batch size, or set subspace "
            "to fewer than there are answer tokens in a batch."
        )


def direction(ctx, params, batches, rng):
    hp, retain, harmful = ctx.hp, batches["retain"], batches["harmful"]
    rng_retain, rng_harmful = jax.random.split(rng)
    width = jax.eval_shape(ctx.model, params, harmful.tokens).hidden["final"].shape[-1]
    for batch in (retain, harmful):
        check_rows(hp, width, batch)

    def measured(params, batch, rng):
        """(sum of losses, sum of weights, Gram matrix): all of them sums over rows."""
        outputs = ctx.model(params, batch.tokens, rng=rng)
        return *losses.weighted_sums(outputs, batch), gram(hp, outputs, batch)

    def featured(params, batch, rng):
        return gram(hp, ctx.model(params, batch.tokens, rng=rng), batch)

    def loss(params):
        total, weight, kept = parts.summed(
            functools.partial(measured, params), retain, hp.microbatches, rng_retain
        )
        hurt = parts.summed(
            functools.partial(featured, params), harmful, hp.microbatches, rng_harmful
        )
        f = losses.average(total, weight)
        kept, hurt = conditioning.spectrum(kept), conditioning.spectrum(hurt)
        well, ill = conditioning.well(kept), conditioning.ill(hurt)
        metrics = {
            "loss/retain": f,
            "penalty/retain": hp.lam_retain * well,
            "penalty/harmful": hp.lam_harmful * ill,
            "log_condition/retain": conditioning.log_condition(kept),
            "log_condition/harmful": conditioning.log_condition(hurt),
        }
        return f + hp.lam_retain * well + hp.lam_harmful * ill, metrics

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_ALIGNMENT)),
}
