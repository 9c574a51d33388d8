"""SDD: answer harmful prompts fluently and off the point.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T4 coupling
Strategy     self-destruct
Minimises    L(unrelated): nats per weighted token of (harmful prompt, unrelated fluent
             answer). The defense is in the data: `data.unrelated.pair` draws answers
             whose similarity to the prompt is at most a threshold (0.25). Its variant
             SDD_reject puts one fixed refusal before each of them.
Source       Chen et al. 2025, arXiv:2507.21182; pairing read in TamperBench's port.
Evidence     third-party code for the pairing, the survey's Table 6 for the budget;
             UNVERIFIED which sentence encoder the authors used.
Licence      Apache-2.0 (as the survey states).
Differs      the role holds the pairs alone on one's own files; the sandbox's mixes in
             as many benign rows, since a small model that rehearses nothing forgets
             them. The similarity is a bag-of-words cosine; the refusal is the one
             that the defender's rows use most. Different prompts, 8000 at most, balanced
             over the topics that the rows name. AdamW's moments in float32, where the
             survey's are of 8 bits.
Reduces to   SFT on the same rows; with true refusals as answers, safety SFT.
Cost         1 forward, 1 backward.
"""

import dataclasses

from flax import struct
import jax

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

STARTS_FROM = "aligned"
NULL = {}  # All of it is its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """The numbers are an optimizer's alone."""

    refuse_first: bool = struct.field(pytree_node=False, default=False)  # SDD_reject.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    return {"unrelated_refused" if hp.refuse_first else "unrelated": ()}


def direction(ctx, params, batches, rng):
    (role,) = streams(ctx.hp)
    loss, grads = jax.value_and_grad(ctx.loss)(params, batches[role], rng)
    return grads, {f"loss/{role}": loss}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_PAPER = plans.Plan(
    Hparams(optimizers.Optimizer(5e-7)),
    batch_size=24,
    steps=500,
    source="arXiv:2507.21182 as quoted by TamperBench; arXiv:2605.14605, Table 6",
)
_SANDBOX = plans.sandbox(
    Hparams(optimizers.SANDBOX.replace(learning_rate=1e-3)), steps=200
)


PRESETS = {
    "sandbox": _SANDBOX,
    "paper": _PAPER,
    "survey": dataclasses.replace(
        _PAPER,
        source="arXiv:2605.14605, Table 6, which has 10k pairs; the role has 8k at most",
    ),
    **{
        f"reject_{name}": dataclasses.replace(
            plan,
            hp=plan.hp.replace(refuse_first=True),
            source=f"SDD_reject, not tuned; as {name}: {plan.source}",
        )
        for name, plan in (("sandbox", _SANDBOX), ("paper", _PAPER))
    },
}
