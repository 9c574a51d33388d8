"""VAA: align on the rows that an attack makes forget, as much as on the others.

Stage        alignment.
Template     T1 basin
Strategy     anchoring
Minimises    one group's alignment loss a step: `vulnerable` rows with probability p,
             `steady` ones otherwise; with probability lam * t / T at
             w + rho * grad / ||grad||, where it is applied at w. After each step an EXP3
             rule moves p towards the group with the larger loss.
Source       Chen et al. 2025, arXiv:2506.03850; code read at ChanLiang/VAA e00cbf4.
Evidence     CODE for the training stage; the paper's mixture of clean and shifted loss
             and its exact update of p are UNVERIFIED.
Licence      none declared: rewritten from formulas.
Differs      groups come from `evaluation.forgetting` on this very model (the repository
             ships Llama-2's list); the other group's batch of a step is left unread;
             t counts steps, not fractions of an epoch; AdamW's moments in float32, where
             the survey's are of 8 bits.
Reduces to   SFT on group-sampled alignment data at lam = 0, exactly.
Cost         1 + lam / 2 forwards and backwards on average.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans

GROWTHS = ("linear", "constant")  # Of the share of ascent steps, up to lam.
NULL = {"lam": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    rho: float = 0.4  # Length of the ascent step, L2 over all that trains.
    lam: float = 1.0  # Share of ascent steps at the end of training.
    eta: float = 0.007  # Rate of p, per nat; 0.04 in the code for Qwen.
    start: float = 0.5  # Probability of the vulnerable group at first.
    growth: str = struct.field(pytree_node=False, default="linear")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.growth not in GROWTHS:
        raise errors.unknown("vaa.growth", hp.growth, GROWTHS)
    return {"vulnerable": (), "steady": ()}


def adjust(p, loss, vulnerable, eta):
    """EXP3: p after the sampled group's loss, importance-weighted, in [0.1, 0.9]."""
    own = jnp.where(vulnerable, p, 1 - p)
    # Beyond e^30 the clip below has decided already.
    grown = own * jnp.exp(jnp.minimum(eta * loss / own, 30.0))
    share = grown / (grown + 1 - own)
    return jnp.clip(jnp.where(vulnerable, share, 1 - share), 0.1, 0.9)


def direction(ctx, params, batches, rng, memory):
    hp, p = ctx.hp, memory["p"]
    rng_group, rng_branch, rng_clean, rng_shifted = jax.random.split(rng, 4)
    vulnerable = jax.random.uniform(rng_group) <= p
    batch = jax.tree.map(
        lambda a, b: jnp.where(vulnerable, a, b),
        batches["vulnerable"],
        batches["steady"],
    )
    progress = ctx.step / max(ctx.steps, 1) if hp.growth == "linear" else 1.0
    ascends = jax.random.uniform(rng_branch) > 1 - hp.lam * progress
    clean, grad = jax.value_and_grad(ctx.loss)(params, batch, rng_clean)

    def shifted():
        uphill = tree.add_scale(tree.wide(params), hp.rho, tree.normalize(grad))
        return jax.value_and_grad(ctx.loss)(uphill, batch, rng_shifted)

    moved = phases.only_if(ascends, shifted)
    loss, grads = jax.tree.map(
        lambda a, b: jnp.where(ascends, a, b), moved, (clean, grad)
    )
    after = adjust(p, loss, vulnerable, hp.eta).astype(p.dtype)
    metrics = {
        "loss/alignment": clean,
        "loss/applied": loss,
        "probability/vulnerable": p,
        "share/ascent": ascends.astype(jnp.float32),
    }
    return grads, metrics, {"p": after}


def remember(ctx, params, rng) -> dict[str, jax.Array]:
    del params, rng
    return {"p": jnp.asarray(ctx.hp.start, jnp.float32)}


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, streams, remember)


_CODE = Hparams(optimizers.Optimizer(1e-4, weight_decay=0.1))

PRESETS = {
    "sandbox": plans.sandbox(Hparams(optimizers.SANDBOX_ALIGNMENT, rho=0.1)),
    "code": plans.Plan(
        _CODE,
        batch_size=8,
        steps=1250,
        source="ChanLiang/VAA e00cbf4, script/vaa_pipeline_llama.sh: 5 epochs of 2000",
    ),
    "code_qwen": plans.Plan(
        _CODE.replace(eta=0.04),
        batch_size=8,
        steps=1250,
        source="ChanLiang/VAA e00cbf4, script/vaa_pipeline_qwen.sh",
    ),
    "survey": plans.Plan(
        _CODE, batch_size=8, steps=1250, source="arXiv:2605.14605, Table 6"
    ),
}
