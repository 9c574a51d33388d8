"""SFT: fine-tune on the user's rows, by default harmful pairs alone.

Threat       open_weight; service through its data alone.
Minimises    L(user): nats per weighted token of the user's rows.
Source       Qi et al. 2023, arXiv:2310.03693; presets: Zloczower et al. 2026,
             arXiv:2605.14605, Table 5, each defense's published naive recipe, and its
             authors' own; NAME_sandbox is the same at the sandbox's scale.
Evidence     FT for Table 5; its sample counts only for ctrap and sdd, the others are
             UNVERIFIED (1000 rows, the default of the git-disl line). CODE, second-hand,
             for the recipes of a defense's own authors.
Reduces to   nothing simpler: it is what the others reduce to.
Cost         1 forward, 1 backward.
"""

import dataclasses
from typing import Any

from flax import struct

from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules


@struct.dataclass
class Hparams(lift.Hparams):
    """Nothing of its own."""


def method(model: types.Model) -> types.Method:
    return lift.supervised(model, "user")


_FULL = adapters.Full()
_QKV = adapters.ATTENTION


def _published(
    learning_rate: float,
    batch_size: int,
    epochs: float,
    samples: int,
    poison_ratio: float,
    adapter: Any = _FULL,
    weight_decay: float = 0.1,
    steps: int = 0,
    note: str = "",
) -> plans.Plan:
    warmup = schedules.Schedule(warmup_ratio=0.1, decay="cosine")
    return plans.Plan(
        Hparams(
            optimizers.Optimizer(learning_rate, warmup, weight_decay=weight_decay),
            adapter,
        ),
        batch_size=batch_size,
        steps=steps,
        epochs=epochs,
        data=recipes.Recipe(sample_count=samples, poison_ratio=poison_ratio),
        source=f"arXiv:2605.14605, Table 5{note}",
    )


_LORA_ATTENTION = adapters.LoRA(alpha=4.0, dropout=0.05, rank=32, targets=_QKV)


def _own(source: str, plan: plans.Plan, decay: str = "cosine", **fields) -> plans.Plan:
    """The recipe of a defense's own authors; constant and linear ones do not warm up."""
    warmup = 0.1 if decay == "cosine" else 0.0
    schedule = schedules.Schedule(warmup_ratio=warmup, decay=decay)
    optimizer = plan.hp.optimizer.replace(schedule=schedule, **fields)
    return dataclasses.replace(
        plan, hp=plan.hp.replace(optimizer=optimizer), source=source
    )


def _in_sandbox(published: plans.Plan, learning_rate: float) -> plans.Plan:
    """A recipe at the sandbox's scale.

    Mixture, number of harmful rows where they come alone, adapter, schedule and weight
    decay are kept. Steps and batch are the sandbox's, a mixture fills up all its task
    rows, and the rate is the one that does most harm to the undefended model.
    """
    data = published.data
    if data.poison_ratio < 1:
        data = dataclasses.replace(data, sample_count=0)
    optimizer = published.hp.optimizer.replace(learning_rate=learning_rate)
    return plans.Plan(
        published.hp.replace(optimizer=optimizer),
        data=data,
        source=f"DESIGN: {published.source}, at the sandbox's scale; BUILD_NOTES.md",
    )


_PUBLISHED = {
    "booster": _published(1e-5, 5, 20, 1000, 0.1, _LORA_ATTENTION),
    "ctrap": _published(1e-5, 10, 20, 500, 0.1, _LORA_ATTENTION),
    "vaa": _published(3e-5, 8, 5, 1000, 0.1),
    "vaccine": _published(
        1e-5, 5, 20, 1000, 0.1, adapters.LoRA(alpha=4.0, dropout=0.1, rank=8)
    ),
    "sdd": _published(2e-5, 10, 5, 100, 1.0),
    "unlearn_smooth": _published(
        1e-5, 4, 3, 20, 1.0, note="; its cap of 100 steps is not reached"
    ),
    # Of the defenses' own papers and scripts, second-hand from specs/.
    "antibody": _own(
        "minhquoc0712/Antibody 1d4fa5f",
        _published(1e-5, 16, 20, 1000, 0.2, adapters.LoRA(4.0, None, 32, _QKV)),
        decay="constant",
    ),
    "t_vaccine": _own(
        "Lslland/T-Vaccine 4513750",
        _published(1e-5, 10, 20, 1000, 0.1, adapters.LoRA(1.0, 0.1, 8)),
    ),
    "repnoise": _own(
        "boyiwei/RepNoise-Reproduce 4f6572d; its middle rate, 1000 of 1k or 10k rows",
        _published(6e-5, 4, 1, 1000, 1.0),
        decay="cosine",
    ),
    "seam": _own(
        "arXiv:2505.12186, its middle rate; no clipping",
        _published(8e-5, 4, 1, 1000, 1.0, weight_decay=0.01),
        clip=float("inf"),
    ),
    "lisa": _own(
        "git-disl/Lisa",
        _published(1e-5, 5, 20, 5000, 0.1, adapters.LoRA(4.0, 0.1, 8, ("q", "v")), 0.0),
        decay="constant",
    ),
    "panacea": _own(
        "git-disl line, arXiv:2501.18100",
        _published(2e-5, 10, 20, 1000, 0.1, adapters.LoRA(4.0, None, 32, _QKV)),
        decay="constant",
    ),
    "antidote_pruning": _own(
        "git-disl/Antidote 26e2ade, SST2; its logs have poison 0.2 on GSM8K",
        _published(1e-4, 5, 20, 5000, 0.2, adapters.LoRA(4.0, None, 256, _QKV)),
    ),
    "sbr": _own(
        "soyoaaa/SBR 188990b",
        _published(1e-5, 32, 20, 1000, 0.1, adapters.LoRA(64.0, None, 16)),
        decay="linear",
    ),
}
# Chosen on `none` alone, in a world of its own (--world_seed=7): BUILD_NOTES.md.
_SANDBOX_RATES = {
    "booster": 1e-2,
    "ctrap": 1e-2,
    "vaa": 1e-4,
    "vaccine": 3e-3,
    "sdd": 1e-4,
    "unlearn_smooth": 1e-4,
    "antibody": 1e-2,
    "t_vaccine": 1e-2,
    "repnoise": 1e-4,
    "seam": 1e-4,
    "lisa": 1e-2,
    "panacea": 1e-2,
    "antidote_pruning": 1e-3,
    "sbr": 3e-4,
}

PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: the best of a learning-rate sweep on `none`; BUILD_NOTES.md",
    ),
    **_PUBLISHED,
    **{
        f"{name}_sandbox": _in_sandbox(_PUBLISHED[name], rate)
        for name, rate in _SANDBOX_RATES.items()
    },
}
