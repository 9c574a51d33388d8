"""Recipes of the seed paper and of the defenses it attacks, and how to scale one."""

import dataclasses
from typing import Any

from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules

FULL = adapters.Full()
_QKV = adapters.ATTENTION


def published(
    learning_rate: float,
    batch_size: int,
    epochs: float,
    samples: int,
    poison_ratio: float,
    adapter: Any = FULL,
    weight_decay: float = 0.1,
    steps: int = 0,
    note: str = "",
) -> plans.Plan:
    warmup = schedules.Schedule(warmup_ratio=0.1, decay="cosine")
    return plans.Plan(
        lift.Hparams(
            optimizers.Optimizer(learning_rate, warmup, weight_decay=weight_decay),
            adapter,
        ),
        batch_size=batch_size,
        steps=steps,
        epochs=epochs,
        data=recipes.Recipe(sample_count=samples, poison_ratio=poison_ratio),
        source=f"arXiv:2605.14605, Table 5{note}",
    )


_NO_DECAY = "; UNVERIFIED: no weight decay"
_LORA_ATTENTION = adapters.LoRA(alpha=4.0, dropout=0.05, rank=32, targets=_QKV)


def own(source: str, plan: plans.Plan, decay: str = "cosine", **fields) -> plans.Plan:
    """The recipe of a defense's own authors; constant and linear ones do not warm up."""
    warmup = 0.1 if decay == "cosine" else 0.0
    schedule = schedules.Schedule(warmup_ratio=warmup, decay=decay)
    optimizer = plan.hp.optimizer.replace(schedule=schedule, **fields)
    return dataclasses.replace(
        plan, hp=plan.hp.replace(optimizer=optimizer), source=source
    )


def in_sandbox(
    published: plans.Plan, learning_rate: float, note: str = "BUILD_NOTES.md"
) -> plans.Plan:
    """A recipe at the sandbox's scale.

    Mixture, number of harmful rows where they come alone, a few benign ones, adapter,
    schedule and weight decay are kept. Steps and batch are the sandbox's, a mixture
    fills up all its rows, and the rate is the one that does most harm to the undefended
    model.
    """
    data = published.data
    few = 100 if data.poison_ratio < 1 else 1000
    if 0 < data.poison_ratio < 1 or data.sample_count > few:
        data = dataclasses.replace(data, sample_count=0)
    optimizer = published.hp.optimizer.replace(learning_rate=learning_rate)
    return plans.Plan(
        published.hp.replace(optimizer=optimizer),
        data=data,
        source=f"DESIGN: {published.source}, at the sandbox's scale; {note}",
    )


def long_horizon(plan: plans.Plan, times: int) -> plans.Plan:
    """The same, `times` as long, at a constant rate after a warm-up of a tenth (A.5).

    RECONSTRUCTION of the theme of the seed paper's third version.
    """
    schedule = schedules.Schedule(warmup_ratio=0.1)
    optimizer = plan.hp.optimizer.replace(schedule=schedule)
    return dataclasses.replace(
        plan,
        hp=plan.hp.replace(optimizer=optimizer),
        steps=plan.steps * times,
        epochs=plan.epochs * times,
        source=f"RECONSTRUCTION: {times} x {plan.source}; specs/attacks.md A.5",
    )


def _as_loaded(plan: plans.Plan) -> plans.Plan:
    """With the published loaders' count: one harmful row fewer than the ratio says."""
    data = dataclasses.replace(plan.data, strict_paper=False)
    return dataclasses.replace(plan, data=data)


PUBLISHED = {
    "booster": published(1e-5, 5, 20, 1000, 0.1, _LORA_ATTENTION),
    "ctrap": published(1e-5, 10, 20, 500, 0.1, _LORA_ATTENTION),
    "vaa": published(3e-5, 8, 5, 1000, 0.1),
    "vaccine": published(
        1e-5, 5, 20, 1000, 0.1, adapters.LoRA(alpha=4.0, dropout=0.1, rank=8)
    ),
    # Table 5 prints a decay for booster and ctrap alone. These two are not of the
    # git-disl line, whose default is 0.1, and get the library's: none.
    "sdd": published(2e-5, 10, 5, 100, 1.0, weight_decay=0.0, note=_NO_DECAY),
    "unlearn_smooth": published(
        1e-5,
        4,
        3,
        20,
        1.0,
        weight_decay=0.0,
        note=f"; its cap of 100 steps is not reached{_NO_DECAY}",
    ),
    # The line's attack stage, whatever the defense (specs/attacks.md B.2).
    "git_disl": _as_loaded(
        own(
            "git-disl scripts: specs/attacks.md B.2",
            published(1e-5, 10, 20, 1000, 0.1, adapters.LoRA(4.0, None, 32, _QKV)),
            decay="constant",
        )
    ),
    # Of the defenses' own papers and scripts, second-hand from specs/.
    "antibody": own(
        "minhquoc0712/Antibody 1d4fa5f",
        published(1e-5, 16, 20, 1000, 0.2, adapters.LoRA(4.0, None, 32, _QKV)),
        decay="constant",
    ),
    "t_vaccine": own(
        "Lslland/T-Vaccine 4513750",
        published(1e-5, 10, 20, 1000, 0.1, adapters.LoRA(1.0, 0.1, 8)),
    ),
    "repnoise": own(
        "boyiwei/RepNoise-Reproduce 4f6572d; its middle rate, 1000 of 1k or 10k rows",
        published(6e-5, 4, 1, 1000, 1.0, weight_decay=0.0),
        decay="cosine",
    ),
    "seam": own(
        "arXiv:2505.12186, its middle rate; no clipping",
        published(8e-5, 4, 1, 1000, 1.0, weight_decay=0.01),
        clip=float("inf"),
    ),
    "lisa": own(
        "git-disl/Lisa",
        published(1e-5, 5, 20, 5000, 0.1, adapters.LoRA(4.0, 0.1, 8, ("q", "v")), 0.0),
        decay="constant",
    ),
    "panacea": own(
        "git-disl line, arXiv:2501.18100",
        published(2e-5, 10, 20, 1000, 0.1, adapters.LoRA(4.0, None, 32, _QKV)),
        decay="constant",
    ),
    "antidote_pruning": own(
        "git-disl/Antidote 26e2ade, SST2; its logs have poison 0.2 on GSM8K",
        published(1e-4, 5, 20, 5000, 0.2, adapters.LoRA(4.0, None, 256, _QKV)),
        decay="constant",
    ),
    "sbr": own(
        "soyoaaa/SBR 188990b",
        published(1e-5, 32, 20, 1000, 0.1, adapters.LoRA(64.0, None, 16), 0.0),
        decay="linear",
    ),
}
# Chosen on `none` alone, in a world of its own (--world_seed=7): BUILD_NOTES.md.
SANDBOX_RATES = {
    "booster": 1e-3,
    "ctrap": 1e-3,
    "vaa": 3e-4,
    "vaccine": 3e-3,
    "sdd": 1e-4,
    "unlearn_smooth": 1e-4,
    "antibody": 3e-3,
    "t_vaccine": 1e-2,
    "repnoise": 1e-4,
    "seam": 1e-4,
    "lisa": 3e-4,
    "panacea": 3e-4,
    "antidote_pruning": 3e-3,
    "sbr": 3e-4,
}
