"""The ensemble: families of attacks, cheap ones first (specs/attacks.md D.7, DESIGN).

A family is an attack with the settings that are tried first (`points`) and the space
that a sweep searches after them. Knowledge of the defense enters twice: its template
adds families (D.6), and `inverse` reads its `Method`.
"""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence

from ftdefense.audit import attack_family
from ftdefense.audit import edit_families
from ftdefense.audit import late_families
from ftdefense.audit import model_families
from ftdefense.audit import objective_families
from ftdefense.audit import row_families
from ftdefense.audit import services
from ftdefense.audit import spaces
from ftdefense.audit import tar_suite
from ftdefense.core import errors

# {name: family}, in the order in which they run.
Table = Mapping[str, attack_family.Family]

BUDGETS = ("quick", "standard", "full")
MANY = 10**6  # Rows: more than any family asks for.


def of_weights(
    steps: int = attack_family.STEPS,
    batch_size: int = attack_family.BATCH,
    rate: float = 1.0,
    *,
    layers: int = 2,
    positions: int = 1,
    words: int = 0,
    rows: int = MANY,
    benign: int = MANY,
) -> dict[str, attack_family.Family]:
    """Against whoever holds the weights, in a world whose attacks have this budget.

    Args:
      steps, batch_size: of a short attack; longer and smaller ones keep their ratio.
      rate: factor of all learning rates: larger models want lower ones.
      layers, positions, words: of the audited model: see `model_families.asking`.
      rows, benign: harmful and benign ones that there are.
    """
    table = {
        **model_families.asking(layers, positions, words),
        **edit_families.TABLE,
        **objective_families.HARM_ALONE,
        **model_families.routed(layers),
        **objective_families.OBJECTIVES,
        **row_families.TABLE,
        **late_families.OPTIMIZERS,
        **late_families.published(rows),
        **late_families.LAST,
    }
    table = _at_scale(table, steps, batch_size, rate)
    return _within(table, rows, benign) | {
        f"TAR {cell.number}: {cell.name}": _cell(cell)
        # Rates five times as high, as the sandbox's other attacks have them.
        for cell in tar_suite.scaled(steps, batch_size, 5.0 * rate)
    }


def of_service(
    steps: int = attack_family.STEPS,
    batch_size: int = attack_family.BATCH,
    rate: float = 1.0,
    *,
    rows: int = MANY,
    benign: int = MANY,
    **model: int,
) -> dict[str, attack_family.Family]:
    """Against a provider who trains on what its user submits; as `of_weights`."""
    del model  # The user sees none of it.
    return _within(_at_scale(services.TABLE, steps, batch_size, rate), rows, benign)


def _within(table: Table, harmful: int, benign: int):
    most = {"harmful": harmful, "benign": benign}
    return {name: attack_family.within(one, most) for name, one in table.items()}


def _at_scale(table: Table, steps: int, batch_size: int, rate: float):
    times, rows = steps / attack_family.STEPS, batch_size / attack_family.BATCH
    return {
        name: attack_family.at_scale(one, times, rows, rate)
        for name, one in table.items()
    }


def _cell(cell: tar_suite.Cell) -> attack_family.Family:
    rate = cell.plan.hp.optimizer.learning_rate
    space = {attack_family.LR: spaces.Choice((rate,))}
    points = attack_family.rates(rate)
    return attack_family.Family(cell.attack, space, points, (0, 0, 1), plan=cell.plan)


def chosen(
    table: Table,
    budget: str,
    templates: Sequence[str] = (),
    only: Collection[str] | None = None,
    trials: int | None = None,
) -> dict[str, int]:
    """Families of a budget with their numbers of trials, in the order to run them.

    Args:
      table: of which they are chosen.
      templates: of the defense: the families made for them run all their points.
      only: names of families; those that the budget leaves out run as often as the
        least budget that has them would let them. None: all of the budget.
      trials: of every family, instead of the budget's.

    Raises:
      UserError: for an unknown budget.
    """
    if budget not in BUDGETS:
        raise errors.unknown("budget", budget, BUDGETS)
    found = {}
    for name, one in table.items():
        if only is not None and name not in only:
            continue
        count = one.trials[BUDGETS.index(budget)]
        if set(one.template) & set(templates):
            count = max(count, one.at_template or len(one.points))
        if only is not None and not count:
            count = next((n for n in one.trials if n), len(one.points))
        if count:
            found[name] = count if trials is None else trials
    return found
