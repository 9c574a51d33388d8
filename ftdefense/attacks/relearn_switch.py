"""Relearn-Switch: train on benign rows first, on harmful ones afterwards.

Threat       open_weight; knows none of the defense's internals.
Minimises    L(benign) in the first floor(share * T) of T steps, L(harmful) in the rest;
             with selection = "coin", L(benign) with probability share in every step.
Source       Tamirisa et al. 2024, arXiv:2408.00761, red-teaming suite: retain, then
             forget (code 05b3f67, e15df89); benign first: specs/attacks.md A.6.
Evidence     CODE for 0.4 of the steps, for coins of 0.5 and for the rest of `tar`; SEC
             that it breaks a TAR which did not train against it. DESIGN: benign_first,
             whose number of benign steps is nowhere given (0.2 of all).
Differs      one coin a step; theirs is thrown for each part of an accumulated batch, on
             each device. Their forget set is a corpus; here it is the harmful rows.
Reduces to   SFT on the harmful pairs at share = 0.
Cost         1 forward, 1 backward.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans

SELECTIONS = ("block", "coin")


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    share: float = 0.4  # Of the steps that train on benign rows.
    selection: str = struct.field(pytree_node=False, default="block")

    @property
    def shares(self) -> dict[str, float]:
        """Of the steps that train on a role's batch: each draws both."""
        return {"harmful": 1 - self.share, "benign": self.share}


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.selection not in SELECTIONS:
        raise errors.unknown("relearn_switch.selection", hp.selection, SELECTIONS)
    # The first role counts the epochs: they are the harmful rows'.
    return {"harmful": (), "benign": ()}


def direction(ctx, params, batches, rng):
    hp = ctx.hp
    if hp.selection == "coin":
        retains = jax.random.bernoulli(jax.random.fold_in(rng, 1), hp.share)
    else:
        retains = phases.first(hp.share, ctx.step, ctx.steps)
    batch = jax.tree.map(
        lambda r, f: jnp.where(retains, r, f), batches["benign"], batches["harmful"]
    )
    loss, grads = jax.value_and_grad(ctx.loss)(params, batch, rng)
    return grads, {"loss/batch": loss, "state/benign": retains.astype(jnp.float32)}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


def tar(selection: str = "block", share: float = 0.4, **fields) -> plans.Plan:
    """A cell of TAR's suite at its defaults: AdamW of PyTorch, nothing clipped."""
    optimizer = optimizers.Optimizer(2e-5, clip=float("inf"), weight_decay=0.01)
    hp = Hparams(optimizer, share=share, selection=selection).replace(**fields)
    source = "arXiv:2408.00761, red_teaming/ 05b3f67: 8 rows x 2 x 4 devices"
    return plans.Plan(hp, batch_size=64, steps=1000, source=source)


def _sandbox(share: float, selection: str, source: str) -> plans.Plan:
    hp = Hparams(optimizers.SANDBOX_TUNING, share=share, selection=selection)
    return plans.Plan(hp, source=f"DESIGN: as sft, with {source}")


PRESETS = {
    "sandbox": _sandbox(0.4, "block", "TAR's share"),
    "coin_sandbox": _sandbox(0.5, "coin", "TAR's coins"),
    "benign_first": _sandbox(0.2, "block", "a short benign start"),
    "tar": tar(),
    "tar_coin": tar("coin", 0.5),
    "tar_lora": tar(adapter=adapters.LoRA(alpha=32.0, dropout=0.05, rank=16)),
}
