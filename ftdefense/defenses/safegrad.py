"""SafeGrad: take out of the user's gradient what points against alignment.

Stage        fine_tuning; the provider trains on the user's rows beside its own.
Template     none
Strategy     anchoring
Minimises    L(user; w) + lam * K(alignment; w), with K the divergence between the frozen
             model's next tokens and w's; where <g_u, g_a> < 0, of their gradients, g_u
             becomes g_u - <g_u, g_a> / ||g_a||^2 g_a first.
Source       Yi et al. 2025, arXiv:2508.07172 (specs: defenses_unlearning_and_traps
             11.2); the code was not readable.
Evidence     RECONSTRUCTION: the surgery and a KL alignment loss are the abstract's;
             UNVERIFIED: the weight lam = 1, KL(frozen || w), one inner product over all
             that trains.
Licence      none declared: rewritten from formulas.
Differs      all alignment rows of the provider, not a fixed handful of about 20. `kl` =
             "reverse" takes KL(w || frozen); `projection` = "leaf" projects every
             tensor, stacked over the layers, by itself.
             A g_a of less than 1e-5 of the length of g_u is taken for rounding.
Reduces to   SFT on user where the gradients do not conflict and lam = 0; at any lam at
             the start of the stage, where K and its gradient are zero.
Cost         3 forwards, 2 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import divergences

PROJECTIONS = ("global", "leaf")
# An alignment gradient so much shorter than the user's is rounding, with a direction
# that means nothing: so it is at the frozen weights, where it should be zero.
_NOISE = 1e-5


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    lam: float = 1.0  # Weight of the alignment gradient in the update.
    kl: str = struct.field(pytree_node=False, default="forward")
    projection: str = struct.field(pytree_node=False, default="global")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    for name, known in (("kl", divergences.KINDS), ("projection", PROJECTIONS)):
        if getattr(hp, name) not in known:
            raise errors.unknown(f"safegrad {name}", getattr(hp, name), known)
    return {"user": (), "alignment": ()}


def surgery(grads, against):
    """(`grads` less its part against `against`, whether there was one)."""
    dot, square = tree.dot(grads, against), tree.dot(against, against)
    conflict = (dot < 0) & (square > jnp.square(_NOISE * tree.norm(grads)))
    scale = jnp.where(conflict, -dot / jnp.where(conflict, square, 1), 0.0)
    return tree.add_scale(grads, scale, against), conflict


def direction(ctx, params, batches, rng):
    hp, (rng_user, rng_alignment) = ctx.hp, jax.random.split(rng)
    divergence = divergences.to_reference(
        ctx.model, ctx.reference, hp.kl, hp.microbatches
    )
    loss, grad_user = jax.value_and_grad(ctx.loss)(params, batches["user"], rng_user)
    kl, grad_alignment = jax.value_and_grad(divergence)(
        params, batches["alignment"], rng_alignment
    )
    cosine = tree.cosine(grad_user, grad_alignment)
    if hp.projection == "global":
        projected, conflict = surgery(grad_user, grad_alignment)
    else:
        leaves, structure = jax.tree.flatten(grad_user)
        pairs = map(surgery, leaves, jax.tree.leaves(grad_alignment))
        leaves, conflicts = zip(*pairs, strict=True)
        projected = jax.tree.unflatten(structure, leaves)
        conflict = jnp.mean(jnp.stack(conflicts), dtype=jnp.float32)
    return tree.add_scale(projected, hp.lam, grad_alignment), {
        "loss/user": loss,
        "kl/alignment": kl,
        "cosine/alignment": cosine,
        "conflict/alignment": conflict.astype(jnp.float32),
    }


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_TUNING, lam=3.0)),
}
