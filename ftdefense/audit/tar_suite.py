"""TAR28-R: the red-teaming suite of TAR, 28 attacks on one release.

Source: Tamirisa et al. 2024, arXiv:2408.00761, axes and defaults of its code
(red_teaming/ 05b3f67, 392912c); specs/attacks.md B.3. Evidence: CODE for the axes, no
clipping, PyTorch's weight decay of AdamW and the optimizers' own numbers;
RECONSTRUCTION for the table of cells, which is nowhere printed (28 in the first
version, 26 in ICLR's). DESIGN: their forget and retain corpora are the attacker's
harmful and benign rows, and several distributions are both of these in one stream.
UNVERIFIED: T_max = 4 * max_steps may stand for four devices, each of which advances the
schedule; here it is four times the run. Their SGDR repeats its first rate once.
"""

from typing import Any
from typing import NamedTuple

from ftdefense.attacks import relearn_switch
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules

_STEPS, _BATCH = 1000, 64
_FLOOR = 5e-6  # A learning rate, of every schedule that decays.
_LORA = adapters.LoRA(alpha=32.0, dropout=0.05, rank=16)
_DATA = {
    "forget": recipes.Recipe(),
    "several": recipes.Recipe(poison_ratio=0.5, filler="benign"),
    "retain": recipes.Recipe(poison_ratio=0.0, filler="benign"),
}
# Rows that change along the run: of relearn_switch, what it selects and its share.
_SWITCHES = {"block": ("block", 0.4), "coins": ("coin", 0.5)}


class Cell(NamedTuple):
    """One attack of the suite.

    Attributes:
      number: 1 to 28, in the table's order.
      name: data, optimizer, rate and what else differs.
      attack: module of `ftdefense.attacks`.
      plan: how it is run.
    """

    number: int
    name: str
    attack: str
    plan: plans.Plan


class _Row(NamedTuple):
    """A line of the table; `batch` and `steps` relative to the defaults."""

    data: str = "forget"
    kind: str = "adamw"
    rate: float = 2e-5
    schedule: str = "constant"
    warmup: int = 0  # Steps, of 1000 or 2000.
    batch: float = 1.0
    steps: int = 1
    lora: bool = False
    nesterov: bool = False


TABLE = (
    *(_Row(rate=rate) for rate in (2e-6, 2e-5, 4e-5)),
    _Row(warmup=30),
    _Row(warmup=100),
    _Row(schedule="cosine", warmup=30),
    _Row(schedule="restarts", warmup=30),
    _Row(kind="adam"),
    _Row(kind="sgd", rate=1e-3),
    _Row(kind="sgd", rate=1e-3, nesterov=True),
    _Row(kind="adagrad"),
    _Row(kind="adadelta", rate=1.0),
    _Row(kind="adamw_sf"),
    *(_Row(batch=batch) for batch in (0.25, 0.5)),
    *(_Row(rate=rate, warmup=30, steps=2) for rate in (2e-5, 4e-5)),
    *(_Row("several", rate=rate) for rate in (2e-5, 4e-5)),
    _Row("retain"),
    *(
        _Row(data, kind, rate)
        for data in _SWITCHES
        for kind, rate in (("adamw", 2e-5), ("adadelta", 1.0))
    ),
    *(_Row(rate=rate, lora=True) for rate in (2e-5, 4e-5, 1e-4)),
    _Row("block", lora=True),
)


def scaled(
    steps: int = _STEPS, batch_size: int = _BATCH, rates: float = 1.0
) -> list[Cell]:
    """The suite at another scale; warm-ups and cycles keep their share of the steps.

    Args:
      steps: of all cells but two, which take twice as many.
      batch_size: of all cells but two, which take a half and a quarter of it.
      rates: factor of all learning rates.
    """
    found = []
    for number, row in enumerate(TABLE, 1):
        plan = plans.Plan(
            _hparams(row, rates),
            batch_size=max(1, round(row.batch * batch_size)),
            steps=row.steps * steps,
            data=_DATA.get(row.data, recipes.Recipe()),
            source="RECONSTRUCTION: arXiv:2408.00761; specs/attacks.md B.3",
        )
        attack = "relearn_switch" if row.data in _SWITCHES else "sft"
        found.append(Cell(number, _name(row), attack, plan))
    return found


def _hparams(row: _Row, rates: float) -> Any:
    # Lengths of the code in steps, as shares of the run that they were made for.
    run = row.steps * _STEPS
    schedule = schedules.Schedule(
        warmup_ratio=row.warmup / run,
        floor=_FLOOR / row.rate,
        period={"cosine": 4.0, "restarts": 100 / run}.get(row.schedule, 0.0),
        decay=row.schedule,
    )
    fields = {"nesterov": True} if row.nesterov else {}
    decay = 0.01 if row.kind == "adamw" else 0.0
    optimizer = optimizers.of_kind(
        row.kind,
        rates * row.rate,
        schedule,
        clip=float("inf"),
        weight_decay=decay,
        **fields,
    )
    adapter = _LORA if row.lora else adapters.Full()
    if row.data not in _SWITCHES:
        return lift.Hparams(optimizer, adapter)
    selection, share = _SWITCHES[row.data]
    return relearn_switch.Hparams(optimizer, adapter, share=share, selection=selection)


def _name(row: _Row) -> str:
    parts = [row.data, row.kind, f"{row.rate:g}"]
    parts += ["nesterov"] if row.nesterov else []
    parts += [row.schedule] if row.schedule != "constant" else []
    parts += [f"warmup{row.warmup}"] if row.warmup else []
    parts += [f"batch x {row.batch:g}"] if row.batch != 1 else []
    parts += [f"steps x {row.steps}"] if row.steps != 1 else []
    return " ".join([*parts, "lora"] if row.lora else parts)
