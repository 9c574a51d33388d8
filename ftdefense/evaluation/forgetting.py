"""Which alignment rows a model forgets first when it is fine-tuned on some harm.

Source: VAA, Chen et al. 2025, arXiv:2506.03850, stage 1: a proxy harmful fine-tuning of
the aligned model, 10 % of it harmful; a row is vulnerable if its answer flips from safe
to harmful at any of T checkpoints. The proxy's rows are the defender's own (DESIGN: the
paper's are Alpaca's and BeaverTails').
"""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json

import numpy as np

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.evaluation import answers
from ftdefense.evaluation import criteria
from ftdefense.training import pipeline

POISON_RATIO = 0.1


def groups(
    bench: pipeline.Bench, seeds: tuple[int, ...]
) -> list[dict[str, pools.Pool]]:
    """Splits the role `alignment` into `vulnerable` and `steady` rows, for each seed.

    Of its benign rows, of which VAA's data has none, each group gets as many as it has
    others, so that the groups differ in vulnerability alone. Where all prompts flip, the
    half that does so first is vulnerable. The proxy attack is a stage that is kept.

    Raises:
      UserError: if nothing flips.
    """
    rows = bench.world.defender["alignment"]
    prompts = list({e.key: e for e in rows.examples if e.label == "harmful"}.values())
    read = answers.Answers(bench.model, bench.world, prompts)
    judge = criteria.judge(bench.world.judge)

    def observe(params: types.Params) -> dict[str, str]:
        said = read(types.Release(params))
        pairs = enumerate(zip(prompts, said, strict=True))
        harmful = [i for i, (e, text) in pairs if judge(e, text) == criteria.RIGHT]
        return {"harmful": json.dumps(harmful)}

    aligned = bench.aligned(seeds)
    attacked = bench.attacked(
        "sft",
        dataclasses.replace(bench.plan("attacks", "sft"), data=recipes.Recipe()),
        aligned,
        seeds,
        roles={"user": proxy(bench.world.defender, POISON_RATIO)},
        observe=observe,
        observer_key="forgetting",
    )
    found = []
    for first, stage in zip(aligned, attacked, strict=True):
        seen = [observe(first.params), *stage.log]
        flipped = flips([json.loads(e["harmful"]) for e in seen], len(prompts))
        pairs = zip(prompts, split(flipped), strict=True)
        found.append(deal(rows, {e.key for e, is_in in pairs if is_in}))
    return found


def deal(rows: pools.Pool, vulnerable: Collection[str]) -> dict[str, pools.Pool]:
    """The two groups; `vulnerable` holds prompts by `Example.key`."""
    refused = np.array([e.label == "harmful" for e in rows.examples])
    forgotten = np.array([e.key in vulnerable for e in rows.examples])
    benign = np.flatnonzero(~refused)

    def group(name: str, wanted: np.ndarray) -> pools.Pool:
        own = np.flatnonzero(refused & wanted)
        spread = np.linspace(0, len(benign) - 1, min(len(own), len(benign)))
        taken = pools.take(rows, np.concatenate([own, benign[spread.astype(int)]]))
        return dataclasses.replace(taken, order=name)

    return {
        "vulnerable": group("vulnerable", forgotten),
        "steady": group("steady", ~forgotten),
    }


def proxy(defender: Mapping[str, pools.Pool], ratio: float) -> pools.Pool:
    """The defender's benign rows with a share `ratio` of harmful ones."""
    benign, harmful = defender["benign"], defender["harmful"]
    count = max(1, round(len(benign) * ratio / (1 - ratio)))
    # Spread over the prompts: the first rows are of few topics.
    drawn = np.linspace(0, len(harmful) - 1, min(count, len(harmful))).astype(int)
    return pools.concatenate([pools.take(harmful, drawn), benign], "proxy")


def flips(harmful: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Whether each prompt flips from safe to harmful at each checkpoint, bool [T, count].

    `harmful[t]` lists the prompts that are answered harmfully at checkpoint t, of T + 1.
    """
    bad = np.zeros((len(harmful), count), bool)
    for at, indices in enumerate(harmful):
        bad[at, list(indices)] = True
    return ~bad[:-1] & bad[1:]


def split(flipped: np.ndarray) -> np.ndarray:
    """Which prompts are vulnerable, bool [count]: those with a flip, but never all."""
    ever = flipped.any(axis=0)
    if not ever.any():
        raise errors.UserError(
            "vaa: no alignment prompt flipped under the proxy attack, so that none is "
            "vulnerable; align for fewer steps (--set=none.steps=...)."
        )
    if not ever.all():
        return ever
    order = np.argsort(np.argmax(flipped, axis=0), kind="stable")
    return np.isin(np.arange(len(ever)), order[: len(ever) // 2])
