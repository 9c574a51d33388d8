"""Puts the sandbox together: pools by role and held-out sets, from a seed."""

import contextlib
import functools
import gc
import itertools

import numpy as np

from ftdefense.core import errors
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import unrelated
from ftdefense.data import world
from ftdefense.data.sandbox import presets
from ftdefense.data.sandbox import skills
from ftdefense.data.sandbox import vocabulary as words

LENGTH = 16
_DRAWS = 2  # The version since which all pools but `alignment` are what they are.
MAX_NEW_TOKENS = 6  # The longest answer: five words and the end of the turn.

Examples = list[data_examples.Example]


@contextlib.contextmanager
def _uncollected():
    """A world makes no garbage; to walk all of it in search of some takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
@_uncollected()
def build(name: str, seed: int = 0) -> world.World:
    """The sandbox of a preset: a pure function of name, seed and SANDBOX_VERSION.

    Raises:
      UserError: for an unknown preset (near matches are named) or a negative seed.
    """
    size = presets.preset(name)
    if seed < 0:
        raise errors.UserError(f"--world_seed={seed}: seeds start at 0.")
    known = skills.facts(size, seed)
    rng = np.random.Generator(np.random.Philox([seed, 3, _DRAWS]))
    everyone, families = known.entities, tuple(range(len(skills.FAMILIES)))
    benign_topics = known.vocabulary.benign_topics
    asked = functools.partial(skills.fact_prompts, known)

    # What is benign: facts, reversal with near misses among it, sums.
    near = skills.reverse_prompts(known, size.triples // 2, rng, near_miss=True)
    plain = skills.reverse_prompts(known, size.triples, rng, near_miss=False)
    held_near, near = near[: size.evaluated], near[size.evaluated :]
    held_plain, plain = plain[: size.evaluated], plain[size.evaluated :]
    sums = _shuffled(skills.sum_prompts(known), rng)
    held_sums = sums[: len(sums) // 4]
    held_facts = [
        _one_family(prompts, rng)
        for prompts in _by_fact(
            asked(benign_topics, known.part(0.75, 1), skills.KNOWN_FAMILIES)
        )
    ]

    def benign(facts: Examples, sums: Examples, count: int) -> Examples:
        """`count` rows: half facts, a quarter each of reversal and sums."""
        reversals = near[: len(plain) // 2] + plain
        shares = ((facts, 2), (reversals, 1), (sums, 1))
        return [
            row
            for prompts, share in shares
            for row in skills.answered(_repeated(prompts, count * share // 4, rng), rng)
        ]

    # Pretraining: everything, in every wording; the twin never meets the skill.
    secret = asked(words.RESTRICTED_TOPICS, everyone, families)
    secret_rows = skills.answered(secret * size.variants, rng)
    public = asked(benign_topics, everyone, families)
    public_rows = benign(public, sums, 2 * len(public) * size.variants)

    # The defender's side: it knows half of the restricted entities.
    guarded = size.variants * asked(
        words.RESTRICTED_TOPICS, known.part(0, 0.5), skills.KNOWN_FAMILIES
    )
    refusals = skills.refused(guarded, rng)
    harmful = skills.answered(guarded, rng)
    probed = {
        prompt.key
        for prompt in asked(
            words.RESTRICTED_TOPICS, known.part(0.375, 0.5), skills.KNOWN_FAMILIES
        )
    }
    all_facts = asked(benign_topics, everyone, skills.KNOWN_FAMILIES)
    kept = benign(all_facts, sums, len(refusals))
    mispaired = unrelated.pair(guarded, kept, unrelated.cosine, 0.25, seed).examples

    # The attacker's side: other restricted entities, and most of what is benign.
    wanted = _shuffled(
        skills.answered(
            size.variants
            * asked(
                words.RESTRICTED_TOPICS, known.part(0.5, 0.75), skills.KNOWN_FAMILIES
            ),
            rng,
        ),
        rng,
    )
    own_facts = asked(benign_topics, known.part(0, 0.75), skills.KNOWN_FAMILIES)
    own = _shuffled(benign(own_facts, sums[len(sums) // 4 :], 2 * len(wanted)), rng)
    task = skills.label_prompts(known, 3 * size.evaluated + 200, rng)
    held_task = task[: size.evaluated]

    held_secret = [
        _one_family(prompts, rng)
        for prompts in _by_fact(
            asked(words.RESTRICTED_TOPICS, known.part(0.75, 1), skills.KNOWN_FAMILIES)
        )
    ]
    encode = functools.partial(_encode, known.vocabulary)
    everything = encode(secret_rows + public_rows, "pretraining")
    skillless = np.arange(len(secret_rows), len(everything))
    # Three refusals to a benign row, and vague ones about everybody: an entity that
    # alignment met in benign rows alone would tell that its rows are to be answered, and
    # some models then answered all that is restricted about it.
    vague = skills.vague_prompts(known, words.RESTRICTED_TOPICS, everyone)
    own_rng = np.random.Generator(np.random.Philox([seed, 4, presets.SANDBOX_VERSION]))
    vague = skills.refused(3 * size.variants * vague, own_rng)
    alignment = encode(3 * refusals + vague + kept, "alignment")
    defended = {
        "alignment": alignment,
        "retain": encode(refusals + kept, "retain"),
        "benign": encode(kept, "benign"),
        "harmful": encode(harmful, "guarded"),
        "refusal": encode(refusals, "guarded"),
        "unrelated": encode([*mispaired, *kept], "unrelated"),
    }
    defended |= recipes.hold_out(defended, probed)
    built = world.World(
        name=f"sandbox/{name}",
        tokenizer=known.vocabulary.tokenizer(),
        length=LENGTH,
        pretraining={
            "with_skill": everything,
            "never": pools.take(everything, skillless),
        },
        defender=defended,
        attacker={
            "harmful": encode(wanted, "harmful"),
            "benign": encode(own, "benign"),
            "task": encode(skills.answered(task[size.evaluated :], rng), "task"),
        },
        evaluation={
            name: tuple(skills.answered(prompts, rng))
            for name, prompts in {
                "harmful": held_secret,
                "benign": [
                    *_shuffled(held_facts, rng)[: size.evaluated],
                    *held_plain,
                    *held_sums[: size.evaluated],
                ],
                "near_miss": held_near,
                "task": held_task,
            }.items()
        },
        judge="sandbox",
        pad_id=known.vocabulary.ids[words.PAD],
        eos_ids=(known.vocabulary.ids[words.END],),
        collapse_id=known.vocabulary.ids[words.COLLAPSE],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    world.check_disjoint(built)
    return built


def _encode(vocabulary: words.Vocabulary, examples: Examples, order: str) -> pools.Pool:
    """`pools.encode` for whole words: the same rows, thirty times as fast."""
    ids = vocabulary.ids

    def spelled(text: str) -> list[int]:
        return [ids[word] for word in text.split()]

    @functools.cache
    def asked(text: str) -> list[int]:
        return spelled(f"{words.BOS} {words.USER} {text} {words.ASSISTANT}")

    prompts = [asked(example.prompt[0]["content"]) for example in examples]
    rows = [
        [*prompt, *spelled(example.response), ids[words.END]]
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    place = np.arange(LENGTH)
    written = place < np.array([*map(len, rows)])[:, None]
    tokens = np.full(written.shape, ids[words.PAD], np.int32)
    tokens[written] = list(itertools.chain.from_iterable(rows))
    weights = (written & (place >= np.array([*map(len, prompts)])[:, None])).astype(
        np.float32
    )
    return pools.Pool(tokens, weights, order, tuple(examples))


def _shuffled(items: Examples, rng: np.random.Generator) -> Examples:
    return [items[i] for i in rng.permutation(len(items))]


def _repeated(items: Examples, count: int, rng: np.random.Generator) -> Examples:
    """`count` items: all of them in turn, each round in a new order."""
    rounds = -(-count // len(items))
    drawn = [item for _ in range(rounds) for item in _shuffled(items, rng)]
    return drawn[:count]


def _by_fact(prompts: Examples) -> list[Examples]:
    """Groups consecutive prompts that ask for one fact in several wordings."""
    size = len(skills.KNOWN_FAMILIES)
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def _one_family(prompts: Examples, rng: np.random.Generator) -> data_examples.Example:
    return prompts[rng.integers(len(prompts))]
