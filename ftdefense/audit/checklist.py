"""What an evaluation must have done, and what in the audit answers for it: specs D.2.

After Carlini et al. 2019, Athalye et al. 2018, Tramer et al. 2020, Croce and Hein 2020.
"""

from collections.abc import Collection
from typing import NamedTuple


class Item(NamedTuple):
    """One demand.

    Attributes:
      demand: in a clause.
      answered_by: diagnostics of which one has to be run; of none, it holds by design.
    """

    demand: str
    answered_by: tuple[str, ...] = ()


CHECKLIST = (
    Item("a stated threat model, and the worst attacker in it, who knows the defense"),
    Item("rates, steps, batch, rank and optimizer swept, not defaults", ("O1", "O3")),
    Item("controls without a defense, and with a broken one"),
    Item("success against budget until it saturates", ("T1", "T2")),
    Item("a larger attack does at least as much as one it contains", ("T3",)),
    Item("more steps or restarts never lower the best so far", ("T1", "O2")),
    Item("random noise of the same norm does less than the gradient", ("R2",)),
    Item("randomised defenses are averaged over their draws", ("R5",)),
    Item("parts without a useful gradient are passed by or replaced", ("G1", "G2")),
    Item("each component of a defense is attacked alone", ("P1", "P2")),
    Item("attacks are joined prompt by prompt", ("T4",)),
    Item("harm with and without a bound on lost capability", ("U1",)),
    Item("one evaluation before and after; several templates, judges", ("E1", "E2")),
    Item("attacks, their settings and their seeds are released", ("R1",)),
    Item("the claim in words: recovery or removal, and of what", ("P4", "P5", "E4")),
)


def unanswered(run: Collection[str]) -> list[str]:
    """Demands for which none of the diagnostics that were run answers."""
    return [
        item.demand
        for item in CHECKLIST
        if item.answered_by and not set(item.answered_by) & set(run)
    ]
