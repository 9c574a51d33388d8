"""Families that edit the weights of a release; nothing trains (specs/attacks.md B.9 to B.13)."""

from ftdefense.audit import attack_family
from ftdefense.audit import spaces

Family = attack_family.Family

TABLE: dict[str, Family] = {
    "quantisation": Family(
        "quantise", **attack_family.grid("format", "int8", "nf4", "int4"), trains=False
    ),
    "weight noise": Family(
        "weight_noise",
        **attack_family.grid("sigma", 0.005, 0.01, 0.02, 0.05, 0.1),
        trains=False,
    ),
    "merge": Family(
        "merge",
        **attack_family.grid("lam", 0.25, 0.5, 0.75, 1.0),
        trains=False,
        knows="the undefended twin",
    ),
    "towards pretrained": Family(
        "revert",
        **attack_family.grid("lam", 0.25, 0.5, 1.0),
        trains=False,
        knows="the public base",
    ),
    "towards aligned": Family(
        "revert",
        {"lam": spaces.Choice((0.25, 0.5, 1.0))},
        [{"lam": lam} for lam in (0.25, 0.5, 1.0)],
        (0, 3, 3),
        preset="original",
        template=("T4", "post-hoc"),
        trains=False,
        knows="the aligned model",
    ),
    "pruning": Family(
        "prune",
        {"q": spaces.Choice((0.01, 0.03, 0.05, 0.1))},
        [{"q": q} for q in (0.01, 0.03, 0.05, 0.1)],
        (0, 4, 4),
        trains=False,
        knows="harmful prompts",
    ),
    "low rank": Family(
        "act_svd",
        {"left_safety": spaces.Choice((0.95, 0.98, 0.99))},
        [{"left_safety": left} for left in (0.95, 0.98, 0.99)],
        (0, 3, 3),
        trains=False,
        knows="harmful prompts",
    ),
}
