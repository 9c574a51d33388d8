"""A world: all the data of an experiment, by role and by side."""

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import examples as data_examples
from ftdefense.data import pools

Examples = tuple[data_examples.Example, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Data of one experiment; sandbox or a user's files.

    Attributes:
      name: for people.
      tokenizer: with a chat template.
      length: L of every training row, in tokens.
      pretraining: sandbox only: `with_skill` and `never`.
      defender: pools by role: alignment, retain, benign, harmful, refusal, unrelated;
        rows of harmful and refusal are paired by prompt. Of the harmful rows,
        `adversary` and `heldout` are two parts without a prompt in common (see
        `recipes.hold_out`); `heldout_refusal` is paired with the latter.
      attacker: harmful, benign, task; disjoint from the defender's harmful prompts.
      evaluation: held-out examples by set: harmful, benign, near_miss, task (the last
        two may be empty).
      judge: name in `evaluation.criteria.JUDGES`.
      pad_id, eos_ids, collapse_id: token ids; the last is CTRAP's target.
      max_new_tokens: longer than every answer.
      eval_batch_size: held-out rows that are answered or scored together.
      notes: what whoever runs it should be told.
    """

    name: str
    tokenizer: Any
    length: int
    pretraining: Mapping[str, pools.Pool]
    defender: Mapping[str, pools.Pool]
    attacker: Mapping[str, pools.Pool]
    evaluation: Mapping[str, Examples]
    judge: str
    pad_id: int
    eos_ids: tuple[int, ...]
    collapse_id: int
    max_new_tokens: int
    eval_batch_size: int = 256
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Names and numbers of rows: a notebook should not print them all."""
        sides = {**self._pools(), "evaluation": self.evaluation}
        lines = [
            f"  {side}: " + ", ".join(f"{k} {len(rows)}" for k, rows in roles.items())
            for side, roles in sides.items()
            if roles
        ]
        head = f"World {self.name}: {len(self.tokenizer)} tokens, rows of {self.length}"
        return "\n".join([head, *lines])

    def _pools(self) -> dict[str, Mapping[str, pools.Pool]]:
        return {
            "pretraining": self.pretraining,
            "defender": self.defender,
            "attacker": self.attacker,
        }

    def hashes(self) -> dict[str, str]:
        """A content hash of every pool and evaluation set, and of the template."""
        found = {
            f"{side}/{role}": pools.digest(pool)
            for side, roles in self._pools().items()
            for role, pool in roles.items()
        }
        for name, examples in self.evaluation.items():
            found[f"evaluation/{name}"] = data_examples.digest(examples)
        found["template"] = chat.template_hash(self.tokenizer)
        return found

    def fingerprint(self) -> str:
        """Changes when anything that training or evaluation reads does."""
        ids = (self.pad_id, self.eos_ids, self.collapse_id)
        return config.digest(
            self.hashes(), self.length, self.judge, self.max_new_tokens, ids
        )


def check_disjoint(world: World) -> None:
    """Refuses held-out prompts that the attacker trains on.

    Raises:
      UserError: counts them and names the sets.
    """
    seen = {
        role: pools.prompt_keys(pool.examples) for role, pool in world.attacker.items()
    }
    for role, evaluated in itertools.product(world.attacker, world.evaluation):
        count = pools.overlap(seen[role], world.evaluation[evaluated])
        if count:
            raise errors.UserError(
                f"{count} held-out {evaluated} prompts are also in the attacker's "
                f"{role} rows; remove them from one file, or give --heldout files "
                "of their own."
            )
