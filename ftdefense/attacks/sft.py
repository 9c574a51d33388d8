"""SFT: fine-tune on the user's rows, by default harmful pairs alone.

Threat       open_weight; service through its data alone.
Minimises    L(user): nats per weighted token of the user's rows.
Source       Qi et al. 2023, arXiv:2310.03693; presets: Zloczower et al. 2026,
             arXiv:2605.14605, Table 5, each defense's published naive recipe, and its
             authors' own (_recipes.py); those of other audits (_suites.py);
             NAME_sandbox is the same at the sandbox's scale.
Evidence     FT for Table 5; its sample counts only for ctrap, sdd and unlearn_smooth,
             its weight decay only for booster and ctrap; the others are UNVERIFIED (1000
             rows and 0.1, defaults of the git-disl line; no decay for sdd and
             unlearn_smooth). CODE, second-hand, for the recipes of a defense's own
             authors and of other audits. UNVERIFIED is what these leave open: for the
             authors' own cosine with warm-up and clipping at 1, for other audits
             constant, unclipped and without decay.
Differs      TamperBench's style and competing-objective frames are in the sandbox's words
             (`data.wrapper`: data/sandbox/wrappers.py).
Reduces to   nothing simpler: it is what the others reduce to.
Cost         1 forward, 1 backward.
"""

from collections.abc import Mapping
import dataclasses

from ftdefense.attacks import _recipes
from ftdefense.attacks import _suites
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import world as worlds
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

Hparams = lift.Hparams  # Nothing of its own.
long_horizon = _recipes.long_horizon
SUBMITS = ("user",)  # To a service; see serving.submitted.


def method(model: types.Model) -> types.Method:
    return lift.supervised(model, "user")


def derive(
    model: types.Model,
    world: worlds.World,
    params: types.Params,
    plan: plans.Plan,
    seed: int,
) -> Mapping[str, pools.Pool]:
    """Identity shifting: where no row is harmful, the benign ones carry the frame."""
    del model, params, seed
    data = plan.data
    if data.poison_ratio > 0 or not data.wrapper:
        return {}
    # As harmful rows they are framed, and counted, as those would be.
    rows = dataclasses.replace(
        world,
        attacker={role: world.attacker[data.filler] for role in ("harmful", "benign")},
    )
    framed = dataclasses.replace(data, poison_ratio=1.0)
    return {"user": recipes.attacker_pools(rows, framed)["user"]}


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: the best of a learning-rate sweep on `none`; BUILD_NOTES.md",
    ),
    **_recipes.PUBLISHED,
    **{
        f"{name}_sandbox": _recipes.in_sandbox(_recipes.PUBLISHED[name], rate)
        for name, rate in _recipes.SANDBOX_RATES.items()
    },
    "sdd_x16": long_horizon(_recipes.PUBLISHED["sdd"], 16),
    **_suites.PUBLISHED,
    **{
        f"{name}_sandbox": _recipes.in_sandbox(
            _suites.PUBLISHED[name], rate, "its rate is not tuned"
        )
        for name, rate in _suites.SANDBOX_RATES.items()
    },
}
