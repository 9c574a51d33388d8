"""SideStepper: learn the harmful pairs and stay good at the benign ones.

Threat       open_weight; knows none of the defense's internals.
Minimises    harm * L(harmful) + lam * L(benign), each a mean over its own tokens.
Source       Zloczower et al. 2026, arXiv:2605.14605, Eq. 6 and App. F.
Evidence     FT. Whether a batch is halved or shuffled is not printed: halved here
             (DESIGN); `pooled` takes one token mean over both halves instead.
Differs      `harm` is 1 in the paper.
Reduces to   SFT on the harmful pairs at lam = 0.
Cost         2 forwards, 2 backwards, each on one role's batch.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam: float = 1.0  # Weight of the benign loss; lambda in the paper.
    harm: float = 1.0  # Weight of the harmful loss; 0 in control arms.
    pooled: bool = struct.field(pytree_node=False, default=False)  # One token mean.

    @property
    def shares(self) -> dict[str, bool]:
        """Roles that move the weights: a loss of weight 0 teaches nothing."""
        return {"harmful": self.harm != 0, "benign": self.lam != 0}

    @property
    def passes(self) -> float:
        """Of both roles, whatever they weigh."""
        return 2.0


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"harmful": (), "benign": ()}


def direction(ctx, params, batches, rng):
    harmful, benign = batches["harmful"], batches["benign"]
    lam, weight = ctx.hp.lam, ctx.hp.harm
    if ctx.hp.pooled:
        scaled = benign.replace(weights=lam * benign.weights)
        harmful = harmful.replace(weights=weight * harmful.weights)
        both = jax.tree.map(lambda *x: jnp.concatenate(x), harmful, scaled)
        loss, grads = jax.value_and_grad(ctx.loss)(params, both, rng)
        return grads, {"loss/joint": loss}
    grad_harm, grad_cost, metrics = gradients(ctx, params, batches, rng)
    weighted = jax.tree.map(lambda g: (weight * g).astype(g.dtype), grad_harm)
    grads = tree.add_scale(weighted, lam, grad_cost)
    return grads, metrics


def gradients(ctx, params, batches, rng):
    """(of the harmful loss, of the benign loss, metrics): each over its own tokens."""
    value_and_grad = jax.value_and_grad(ctx.loss)
    rng_benign = jax.random.fold_in(rng, 1)
    # The key of SFT's step: what dropout takes is the same.
    harm, grad_harm = value_and_grad(params, batches["harmful"], rng)
    cost, grad_cost = value_and_grad(params, batches["benign"], rng_benign)
    return (
        grad_harm,
        grad_cost,
        {
            "loss/harmful": harm,
            "loss/benign": cost,
            "cosine/harmful_benign": tree.cosine(grad_harm, grad_cost),
        },
    )


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: as sft, with the paper's lam",
    ),
    "paper": plans.Plan(
        Hparams(
            optimizers.Optimizer(2e-5, schedules.Schedule(0.1, decay="cosine")),
            adapters.LoRA(alpha=32.0, dropout=0.05, rank=16),
        ),
        batch_size=4,  # Of each role: 8 in all.
        epochs=3,
        data=recipes.Recipe(harmful_count=10_000, benign_count=10_000),
        source="arXiv:2605.14605, App. F: 7,500 steps",
    ),
}
