"""A world from a user's own files: split by prompt, never by row."""

import dataclasses
import functools
import hashlib
from typing import Any

from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import unrelated
from ftdefense.data import world as worlds

Examples = tuple[data_examples.Example, ...]

# What a harmful prompt is answered with where no refusals are given.
REFUSAL = "I cannot help with that."
# Its last token is what CTRAP collapses to, as in its code.
COLLAPSE = "an error"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Examples by role; empty where the user gave none.

    Attributes:
      harmful: harmful prompts with compliant answers.
      benign: benign prompts with answers.
      refusals: harmful prompts with refusals; `REFUSAL` answers the rows of `harmful`
        that have none here. Prompts that `harmful` lacks are aligned on, too.
      task: a task that users fine-tune for.
      heldout_harmful, heldout_benign: evaluation rows; else a fifth of the above.
    """

    harmful: Examples
    benign: Examples
    refusals: Examples = ()
    task: Examples = ()
    heldout_harmful: Examples = ()
    heldout_benign: Examples = ()


def build(
    sources: Sources,
    tokenizer: Any,
    *,
    length: int,
    max_new_tokens: int,
    eval_batch_size: int = 32,
    seed: int = 0,
    truncate: bool = False,
    collapse_word: str = COLLAPSE,
    judge: str = "keyword",
    similarity: unrelated.Similarity = unrelated.cosine,
    threshold: float = 0.25,
) -> worlds.World:
    """A world with the roles of the sandbox, all but pretraining.

    The role `unrelated` is the mispaired rows alone, balanced over topics, as SDD was
    published: `similarity` scores prompts against answers, and pairs at or below
    `threshold` count as unrelated. Where a prompt has none, its least similar answer
    is taken, and `World.notes` says of how many.

    Prompts are dealt by a hash of prompt and seed: of ten, four to the defender, four
    to the attacker, two held out (none, where held-out rows are given). Within a part
    they stand in the order of another hash, so that the first 100 rows are a sample.

    Raises:
      UserError: for an empty part, rows over `length` without `truncate`, rows of the
        wrong label, or held-out prompts that the attacker trains on.
    """
    _check_labels(sources)
    if tokenizer.eos_token_id is None:
        raise errors.UserError("the tokenizer has no end-of-sequence token.")
    pad_id = tokenizer.pad_token_id
    pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
    harmful = _deal(sources.harmful, seed, bool(sources.heldout_harmful))
    benign = _deal(sources.benign, seed, bool(sources.heldout_benign))
    for name, dealt in (("harmful", harmful), ("benign", benign)):
        for part in ("defender", "attacker"):
            if not dealt[part]:
                raise errors.UserError(
                    f"no {name} rows fall to the {part}; give more rows with --{name}."
                )
    task = _deal(sources.task, seed, False)
    encode = functools.partial(
        pools.encode, tokenizer, length=length, pad_id=pad_id, truncate=truncate
    )
    by_prompt = {e.key: e for e in sources.refusals}
    refusals = [
        by_prompt.get(e.key, dataclasses.replace(e, response=REFUSAL))
        for e in harmful["defender"]
    ]
    known = {e.key for e in (*sources.harmful, *sources.heldout_harmful)}
    further = [e for e in sources.refusals if e.key not in known]
    kept = benign["defender"]
    retain = encode([*refusals, *further, *kept], order="alignment")
    mispaired = unrelated.pair(
        unrelated.balanced(harmful["defender"]), kept, similarity, threshold, seed
    )
    notes = ()
    if mispaired.fallbacks:
        notes = (
            f"of {len(mispaired.examples)} harmful prompts {mispaired.fallbacks} found no "
            "benign answer that is unrelated; the role `unrelated` (SDD) has the least "
            "similar one. More rows in --benign help.",
        )
    defender = {
        "alignment": retain,
        "retain": retain,
        "benign": encode(kept, order="benign"),
        "harmful": encode(harmful["defender"], order="guarded"),
        "refusal": encode(refusals, order="guarded"),
        "unrelated": encode(mispaired.examples, order="unrelated"),
    }
    # In the order of a hash: the last quarter of the prompts is a sample of them.
    prompts = list(dict.fromkeys(e.key for e in harmful["defender"]))
    if len(prompts) > 1:
        probed = set(prompts[-max(1, len(prompts) // 4) :])
        defender |= recipes.hold_out(defender, probed)
    attacker = {
        "harmful": encode(harmful["attacker"], order="harmful"),
        "benign": encode(benign["attacker"], order="benign"),
    }
    if sources.task:
        attacker["task"] = encode(task["attacker"] + task["defender"], order="task")
    built = worlds.World(
        name="own files",
        tokenizer=tokenizer,
        length=length,
        pretraining={},
        defender=defender,
        attacker=attacker,
        evaluation={
            "harmful": tuple(sources.heldout_harmful or harmful["heldout"]),
            "benign": tuple(sources.heldout_benign or benign["heldout"]),
            "near_miss": (),
            "task": tuple(task["heldout"]),
        },
        judge=judge,
        pad_id=pad_id,
        eos_ids=tuple(sorted({tokenizer.eos_token_id, chat.end_of_turn(tokenizer)})),
        collapse_id=_collapse_id(tokenizer, collapse_word),
        max_new_tokens=max_new_tokens,
        eval_batch_size=eval_batch_size,
        notes=notes,
    )
    for name in ("harmful", "benign"):
        if not built.evaluation[name]:
            raise errors.UserError(
                f"no {name} rows are left to hold out; give more rows with --{name} "
                f"or a file with --heldout_{name}."
            )
        # What scores it cuts to `length`: refused here, before anything trains.
        encode(built.evaluation[name], order=f"heldout_{name}")
    worlds.check_disjoint(built)
    return built


def _deal(examples: Examples, seed: int, heldout_given: bool) -> dict[str, list]:
    dealt: dict[str, list] = {"defender": [], "attacker": [], "heldout": []}
    parts = ["defender"] * 4 + ["attacker"] * 4
    parts += ["defender", "attacker"] if heldout_given else ["heldout"] * 2
    for example in examples:
        hashed = hashlib.sha256(f"{seed}{example.key}".encode()).digest()
        dealt[parts[hashed[0] % 10]].append(example)
    return {
        part: sorted(
            examples,
            key=lambda e: hashlib.sha256(
                f"{seed}{e.key}{e.response}".encode()
            ).digest(),
        )
        for part, examples in dealt.items()
    }


def _check_labels(sources: Sources) -> None:
    for field in dataclasses.fields(sources):
        wanted = "benign" if "benign" in field.name else "harmful"
        rows = getattr(sources, field.name)
        odd = sum(e.label != wanted for e in rows)
        if odd and field.name != "task":  # Its rows may be poisoned on purpose.
            raise errors.UserError(
                f"--{field.name}: {odd} of {len(rows)} rows are not labelled {wanted}; "
                "put each label into a file of its own."
            )


def _collapse_id(tokenizer: Any, word: str) -> int:
    """The last id of the words, as CTRAP's code takes it."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if not ids:
        raise errors.UserError("--collapse_word is empty; give a word.")
    return ids[-1]
