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
      weights: whether only who holds the weights can answer, no user of a service.
    """

    demand: str
    answered_by: tuple[str, ...] = ()
    weights: bool = False


CHECKLIST = (
    Item("a stated threat model, and the worst attacker in it, who knows the defense"),
    Item(
        "rates, steps, batch, rank and optimizer swept, not defaults",
        ("O1", "O3"),
        True,
    ),
    Item("controls without a defense, and with a broken one"),
    Item("success against budget until it saturates", ("T1", "T2")),
    Item("a larger attack does at least as much as one it contains", ("T3",), True),
    Item("more steps or restarts never lower the best so far", ("T1", "O2"), True),
    Item("random noise of the same norm does less than the gradient", ("R2",), True),
    Item("randomised defenses are averaged over their draws", ("R5",), True),
    Item(
        "parts without a useful gradient are passed by or replaced", ("G1", "G2"), True
    ),
    Item("each component of a defense is attacked alone", ("P1", "P2"), True),
    Item("attacks are joined prompt by prompt", ("T4",)),
    Item("harm with and without a bound on lost capability", ("U1",)),
    Item("one evaluation before and after; several templates, judges", ("E1", "E2")),
    Item("attacks, their settings and their seeds are released", ("R1",)),
    Item(
        "the claim in words: recovery or removal, and of what", ("P4", "P5", "E4"), True
    ),
)


def unanswered(run: Collection[str], weights: bool = True) -> list[str]:
    """Demands for which none of the diagnostics that were run answers.

    Without `weights` only those that the user of a service can answer.
    """
    return [
        item.demand
        for item in CHECKLIST
        if item.answered_by
        and (weights or not item.weights)
        and not set(item.answered_by) & set(run)
    ]
