"""Data recipes: which rows an attacker uses."""

from collections.abc import Collection
from collections.abc import Mapping
import dataclasses
import math

import numpy as np

from ftdefense.core import errors
from ftdefense.data import pools
from ftdefense.data import world as worlds
from ftdefense.data.sandbox import wrappers

FRAME = 16  # Tokens that a frame may add to a row.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which of the attacker's rows an attack trains on; 0 means all there are.

    Attributes:
      harmful_count, benign_count: rows of the roles `harmful` and `benign`.
      sample_count: rows of the role `user`, harmful and filler together.
      poison_ratio: share of harmful rows in `user`.
      filler: what the rest of `user` is: `benign` or `task`.
      strict_paper: False repeats the off-by-one of the published loaders (git-disl),
        which take one harmful row fewer than the ratio says: 99 and 900 of 1000.
      wrapper: jailbreak frame that harmful prompts are put through, those of evaluation
        included: a name of `sandbox.wrappers`; empty: none.
      wrapped: share of the harmful rows that carry it, from the front: of those in
        `user`, which may be fewer than in `harmful`.
      topics: of the harmful rows; empty: all. The others are out of distribution.
    """

    harmful_count: int = 0
    benign_count: int = 0
    sample_count: int = 0
    poison_ratio: float = 1.0
    filler: str = "task"
    strict_paper: bool = True
    wrapper: str = ""
    wrapped: float = 1.0
    topics: tuple[str, ...] = ()


def attacker_pools(world: worlds.World, recipe: Recipe) -> dict[str, pools.Pool]:
    """Pools by role for one attack: harmful, benign and the mixture `user`.

    Rows are taken from the front, so that a smaller attack uses a part of a larger
    one's. A `user` of harmful rows alone is the role `harmful` itself: the same rows
    in the same order.

    Raises:
      UserError: if more rows are asked for than there are, or a field is out of range.
    """
    if not 0 <= recipe.poison_ratio <= 1:
        raise errors.UserError(
            f"data.poison_ratio is a share in [0, 1], but {recipe.poison_ratio} is given."
        )
    if recipe.filler not in ("benign", "task"):
        raise errors.unknown("data.filler", recipe.filler, ("benign", "task"))
    if not 0 <= recipe.wrapped <= 1:
        raise errors.UserError(
            f"data.wrapped is a share in [0, 1], but {recipe.wrapped} is given."
        )
    harmful = world.attacker["harmful"]
    if recipe.topics:
        harmful = _on(recipe.topics, harmful)
    harmful = pools.take(harmful, recipe.harmful_count)
    benign = pools.take(world.attacker["benign"], recipe.benign_count)
    filler = world.attacker.get(recipe.filler)
    if recipe.poison_ratio == 1:
        total = poisoned = recipe.sample_count or len(harmful)
    else:
        if filler is None:
            raise errors.UserError(
                f"data.filler={recipe.filler}: this world has no such rows; "
                "give a file with --task or set data.filler=benign."
            )
        total = recipe.sample_count or len(filler)
        poisoned = harmful_rows(total, recipe.poison_ratio, recipe.strict_paper)
    if recipe.wrapper:
        # The frame makes some rows longer: all of an attack are of one length.
        width = world.length + FRAME
        harmful = _framed(world, harmful, recipe, poisoned, width)
        benign = _encoded(world, benign.examples, benign.order, width)
        filler = filler and _encoded(world, filler.examples, filler.order, width)
    found = {"harmful": harmful, "benign": benign}
    if recipe.poison_ratio == 1:
        found["user"] = pools.take(harmful, recipe.sample_count)
        return found
    parts = []
    if poisoned:
        parts.append(pools.take(harmful, poisoned))
    # What is left of the total, so that a ratio of 0.5 of 5 rows gives 5 rows.
    rest = total - harmful_rows(total, recipe.poison_ratio, True)
    if rest:
        parts.append(pools.take(filler, rest))
    found["user"] = pools.concatenate(parts, "user")
    return found


def _on(topics: tuple[str, ...], rows: pools.Pool) -> pools.Pool:
    """The rows of these topics."""
    known = dict.fromkeys(example.topic for example in rows.examples)
    for topic in topics:
        if topic not in known:
            raise errors.unknown("topic of data.topics", topic, known)
    kept = [i for i, example in enumerate(rows.examples) if example.topic in topics]
    return pools.take(rows, np.array(kept))


def _framed(
    world: worlds.World, rows: pools.Pool, recipe: Recipe, used: int, width: int
) -> pools.Pool:
    """The first share of the `used` first rows, put through the recipe's frame."""
    frame = wrappers.wrapper(recipe.wrapper)
    count = round(recipe.wrapped * min(used, len(rows)))
    if recipe.wrapped == 1:  # All there are: a role may hold more than `user` does.
        count = len(rows)
    examples = [frame(e)[0] for e in rows.examples[:count]] + [*rows.examples[count:]]
    return _encoded(world, examples, rows.order, width)


def _encoded(world, examples, order: str, width: int) -> pools.Pool:
    return pools.encode(
        world.tokenizer, examples, width, order=order, pad_id=world.pad_id
    )


def harmful_rows(total: int, ratio: float, strict_paper: bool) -> int:
    """Harmful rows among `total`: 100 of 1000 at 0.1, or the loaders' 99."""
    if strict_paper:
        return round(ratio * total)
    # They keep the places strictly between 0 and ratio * total.
    return max(math.ceil(ratio * total) - 1, 0)


def hold_out(
    defender: Mapping[str, pools.Pool], prompts: Collection[str]
) -> dict[str, pools.Pool]:
    """Splits the defender's harmful pairs for methods that judge a simulated attack.

    Returns:
      `adversary`, the harmful rows that a simulated attack trains on; `heldout` and
      `heldout_refusal`, those of `prompts` (by `Example.key`), paired with refusals.

    Raises:
      UserError: if a side of the split would be empty.
    """
    judged = np.array([e.key in prompts for e in defender["harmful"].examples], bool)
    if judged.all() or not judged.any():
        raise errors.UserError(
            f"{judged.sum()} of {len(judged)} harmful rows of the defender would be "
            "held out for simulated attacks; give more harmful prompts with --harmful."
        )

    def part(role: str, rows: np.ndarray, order: str) -> pools.Pool:
        taken = pools.take(defender[role], np.flatnonzero(rows))
        return dataclasses.replace(taken, order=order)

    return {
        "adversary": part("harmful", ~judged, "adversary"),
        "heldout": part("harmful", judged, "heldout"),
        "heldout_refusal": part("refusal", judged, "heldout"),
    }


def refused(world: worlds.World, rows: pools.Pool, seed: int) -> pools.Pool:
    """The prompts of `rows`, each with a refusal drawn from the defender's, paired."""
    rng = np.random.Generator(np.random.Philox([seed, 5]))
    refusals = world.defender["refusal"].examples
    drawn = rng.integers(len(refusals), size=len(rows))
    return pools.encode(
        world.tokenizer,
        [
            dataclasses.replace(example, response=refusals[i].response)
            for example, i in zip(rows.examples, drawn, strict=True)
        ],
        max(world.length, rows.tokens.shape[1]),  # A frame made them longer.
        order=rows.order,
        pad_id=world.pad_id,
        truncate=True,
    )
