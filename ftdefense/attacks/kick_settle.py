"""Kick-Settle: SFT whose first steps are far too long, then settle.

Threat       open_weight; knows none of the defense's internals.
Minimises    L(user), as SFT; only the learning rate differs: `kick` times its peak for
             a share `kick_ratio` of the steps, then a cosine from the peak to 1 / 100.
Source       Zloczower et al. 2026, arXiv:2605.14605, App. H.
Evidence     FT for the schedule, 50 <= kick <= 100; kick_ratio is not printed
             (UNVERIFIED: 0.05 here), nor is the number of steps. The paper's data is
             the attack split of 10,000 rows with LoRA (artifacts.md 1, row 1).
Reduces to   SFT with a cosine to 1 / 100 at kick_ratio = 0.
Cost         1 forward, 1 backward.
"""

from ftdefense.attacks import sft
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules

Hparams = sft.Hparams
method = sft.method  # The same functions: one compilation serves both.


def schedule(kick: float = 75.0, kick_ratio: float = 0.05) -> schedules.Schedule:
    """The paper's eta(t) / eta_0; `kick` in [50, 100] there."""
    return schedules.Schedule(
        floor=0.01, kick_ratio=kick_ratio, kick=kick, decay="cosine"
    )


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.Optimizer(1e-5, schedule())),
        source="DESIGN: the paper's kick on a peak that leaves `none` useful",
    ),
    "paper": plans.Plan(
        Hparams(
            optimizers.Optimizer(2e-5, schedule()),
            adapters.LoRA(alpha=32.0, dropout=0.05, rank=16),
        ),
        batch_size=8,
        epochs=4,
        data=recipes.Recipe(sample_count=10_000, poison_ratio=1.0),
        source="arXiv:2605.14605, App. H; epochs inferred from App. E's timings",
    ),
}
