"""What a step of a defense costs, in forwards and backwards over a batch of one role."""

import math
import re

import jax

from ftdefense.core import cards
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import types


def of_step(
    name: str,
    hp: types.Hparams,
    length: int,
    readouts: float,
    ascents: float | None = None,
) -> tuple[float, float]:
    """(forwards, backwards) of one step: as the docstring's Cost says of these numbers.

    A forward of three rows for each row of a batch counts as three, one of rows twice as
    long as two, and what is differentiated again as one forward and two backwards more,
    with what is computed again for it on top.

    Args:
      name: of the defense, or its file.
      hp: its numbers.
      length: of a row.
      readouts: of all hidden states, in forwards: `of_all_states`.
      ascents: share of VAA's steps that ascend; None: as many as its lam says.

    Raises:
      UserError: if the docstring's Cost begins with no count.
    """
    k = getattr(hp, "inner_steps", 0)
    described = {
        "antidote": lambda: (8 * hp.block_steps, 3 * hp.block_steps),
        "clamp": lambda: (7 * k + 5, 6 * k + 7),
        "deep_alignment": lambda: (
            (1 + min(hp.max_prefix, length) / length + hp.anchors,) * 2
        ),
        "ktipa_code": lambda: (12, 3),
        "ktipa_noh": lambda: (3 * 6 + 1 + k, 3 * 2 + 1 + k),
        "ktipa_recon": lambda: (3 * 6 + 1 + k, 3 * 2 + 1 + k),
        "lat": lambda: (2 * k + 3 * hp.updates + 1, 2 * k + 3 * hp.updates),
        "mlac": lambda: (4 * k + 1, 5 * k + 1),
        "patcher": lambda: (
            2 * hp.defend_steps + hp.attack_steps,
            2 * hp.defend_steps + hp.attack_steps,
        ),
        "repnoise": lambda: (
            2 + hp.rehearse + 2 * readouts,
            2 + hp.rehearse + readouts,
        ),
        "seam": lambda: (8, 8) if hp.exact else (6, 6),
        "tar": lambda: (k + k // hp.every + 2, k + k // hp.every + 1),
        "unlearn_smooth": lambda: (4, 3),  # npo with sam
        "vaa": lambda: (1 + (hp.lam / 2 if ascents is None else ascents),) * 2,
    }
    if name in described:
        return described[name]()
    text = cards.card(registry.load("defenses", name)).get("Cost", "")
    found = re.match(r"(\d+) forwards?, (\d+) backwards?", text)
    if found is None:
        raise errors.UserError(f"{name}: its Cost begins with no count of passes.")
    return tuple(map(float, found.groups()))


def passes(forwards: float, backwards: float) -> float:
    """In forwards and backwards together: a backward costs two forwards."""
    return (forwards + 2 * backwards) / 3


def of_all_states(params: types.Params) -> float:
    """Cost of N + 1 readouts over a forward's, by the kernels that both multiply."""
    blocks = jax.tree.leaves(params["layers"])
    inner = sum(math.prod(leaf.shape) for leaf in blocks)
    head = math.prod(params["embed"]["embedding"].shape)
    return (len(blocks[0]) + 1) * head / (inner + head)
