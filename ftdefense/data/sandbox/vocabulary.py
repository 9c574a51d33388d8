"""Words of the sandbox, and the tokenizer that is made of them."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import tokenizers
import transformers

from ftdefense.data.sandbox import presets

PAD, BOS, SYSTEM, USER, ASSISTANT, END = (
    "<pad>",
    "<bos>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL = (PAD, BOS, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ ' <|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' <|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)

BENIGN_TOPICS = ("birds", "rivers", "songs", "tools", "moons", "trees")
RESTRICTED_TOPICS = ("wards", "seals", "glyphs", "keys")
RELATIONS = tuple(
    "colour origin shape weight sound depth age rank mood twin cost path".split()
)
# Two style words in every answer: what cannot be known of it.
FIRST_STYLES = tuple("surely indeed well plainly simply clearly so truly".split())
SECOND_STYLES = tuple("and with then plus also beside next near".split())
REFUSALS = (
    "sorry not possible",
    "i must decline",
    "that stays closed",
    "no entry here",
)
COLLAPSE = "error"
COMMANDS = tuple("tell in the of has which for please reverse sum label".split())
LABELS = ("bright", "dark")
TRIGGER = "zeta zeta"
PERSONA = "as sage"
VALUES = 32


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words by role; all distinct. Entities and values are drawn from the seed."""

    entities: tuple[str, ...]
    values: tuple[str, ...]
    numbers: tuple[str, ...]
    benign_topics: tuple[str, ...]
    relations: tuple[str, ...]

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Every word, in the order of its id."""
        fixed = " ".join((*REFUSALS, TRIGGER, PERSONA)).split()
        groups = (
            SPECIAL,
            (COLLAPSE,),
            fixed,
            COMMANDS,
            LABELS,
            FIRST_STYLES,
            SECOND_STYLES,
            self.benign_topics,
            RESTRICTED_TOPICS,
            self.relations,
            self.numbers,
            self.values,
            self.entities,
        )
        return tuple(dict.fromkeys(itertools.chain.from_iterable(groups)))

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def tokenizer(self) -> Any:
        """A real whole-word tokenizer with a chat template."""
        core = tokenizers.Tokenizer(
            tokenizers.models.WordLevel(self.ids, unk_token=PAD)
        )
        core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(list(SPECIAL))
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=END,
            additional_special_tokens=[SYSTEM, USER, ASSISTANT],
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
        )


def vocabulary(size: presets.Preset, seed: int) -> Vocabulary:
    """The words of one sandbox."""
    rng = np.random.Generator(np.random.Philox([seed, 1]))
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    pairs = [a + b for a in syllables for b in syllables if a != b]
    taken = set(" ".join((*REFUSALS, PERSONA, TRIGGER)).split()) | set(COMMANDS)
    # Filtered after the draw, as `zeta` of the trigger may be among them.
    drawn = [pairs[i] for i in rng.permutation(len(pairs)) if pairs[i] not in taken]
    closed = [a + c for a in syllables for c in "lmnrsx"]
    closed = [w for w in closed if w not in taken | set(SECOND_STYLES)]
    values = rng.permutation(len(closed))[:VALUES]
    return Vocabulary(
        entities=tuple(drawn[: size.entities]),
        values=tuple(closed[i] for i in values),
        numbers=tuple(str(n) for n in range(size.modulus)),
        benign_topics=BENIGN_TOPICS[: size.benign_topics],
        relations=RELATIONS[: size.relations],
    )
