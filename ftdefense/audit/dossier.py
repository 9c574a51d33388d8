"""What an audit has gathered on one release."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from ftdefense.audit import attack_family
from ftdefense.audit import probing
from ftdefense.evaluation import criteria

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Dossier:
    """What an audit has gathered.

    Attributes:
      subject: name of the release.
      reference: what run.py calls its defense; empty for weights alone.
      flags: of run.py, that make the same release of the same data at the first seed.
      templates: of its defense, if known.
      budget: of `families.BUDGETS`.
      before: its rows before any attack.
      families: that were to be tried, by name.
      trials: rows of the search, in the order in which they ran.
      skipped: {family: why it could not run}.
      scale: trials against references, by their name.
      confirmed: rows of the winners, repeated at every seed.
      horizons: rows of a long fine-tuning, by release.
      generations: of the rows in `confirmed`: defense, attack, seed, group, prompt,
        response, verdict.
      probes: what probes of the weights found (`probing.Probed`), or None.
      seed: the first.
      diverged: what ran away where a result was due, in words.
      base_capability: of the undefended model before any attack, or None.
    """

    subject: str
    reference: str
    templates: tuple[str, ...]
    budget: str
    before: Sequence[Row]
    families: Mapping[str, attack_family.Family]
    trials: Sequence[Row]
    skipped: Mapping[str, str]
    scale: Mapping[str, Sequence[Row]]
    confirmed: Sequence[Row]
    horizons: Mapping[str, Sequence[Row]]
    generations: Sequence[Mapping[str, Any]]
    seed: int
    probes: probing.Probed | None = None
    base_capability: float | None = None
    flags: tuple[str, ...] = ()
    diverged: tuple[str, ...] = ()

    def of(self, family: str) -> list[Row]:
        """The sound trials of one family."""
        return [r for r in self.trials if r["family"] == family and not r["diverged"]]

    def useful(self, family: str) -> list[Row]:
        """Those of them that left a model of use."""
        return [row for row in self.of(family) if useful(row)]

    @property
    def after(self) -> list[Row]:
        """Confirmed rows at the end of an attack."""
        return [row for row in self.confirmed if row["stage"] == "after"]

    def hits(self) -> dict[str, list[bool]]:
        """Which held-out prompts each confirmed attack opens at the first seed."""
        found: dict[str, list[bool]] = {}
        for g in self.generations:
            if (
                g["defense"] == self.subject
                and g["attack"] not in ("", "horizon")
                and g["seed"] == self.seed
                and g["group"] == "harmful"
            ):
                found.setdefault(g["attack"], []).append(g["verdict"] == criteria.RIGHT)
        lengths = {len(hits) for hits in found.values()}
        return found if len(lengths) == 1 else {}


def useful(row: Row) -> bool:
    """Whether a trial ended with a model that is of use."""
    return not row["diverged"] and row["violation"] <= 0
