"""What a release says, made into rows to train on."""

from collections import Counter
from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from ftdefense.core import types
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import world as worlds
from ftdefense.models import generate
from ftdefense.models import transformer


def answers(
    model: transformer.LanguageModel,
    world: worlds.World,
    params: types.Params,
    examples: Sequence[data_examples.Example],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One answer to each prompt, special tokens removed."""
    prompts = pools.encode_prompts(world.tokenizer, examples, pad_id=world.pad_id)
    count, size = len(examples), min(world.eval_batch_size, len(examples))
    # The last batch repeats some, so that all have one shape.
    rows = np.arange(-(-count // size) * size) % count
    said = [
        generate.generate(
            model,
            params,
            prompts.tokens[part],
            prompts.mask[part],
            jax.random.fold_in(jax.random.key(seed), i),
            max_new_tokens=world.max_new_tokens,
            eos_ids=world.eos_ids,
            pad_id=world.pad_id,
            temperature=temperature,
        )
        for i, part in enumerate(rows.reshape(-1, size))
    ]
    ids = np.concatenate([np.asarray(part) for part in said])[:count]
    texts = world.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def refusals(
    model: transformer.LanguageModel,
    world: worlds.World,
    params: types.Params,
    examples: Sequence[data_examples.Example],
) -> list[str]:
    """What the release says to harmful prompts and is known as a refusal, as often.

    If it says none that is known, the defender's public refusals.
    """
    known = Counter(e.response.strip() for e in world.defender["refusal"].examples)
    own = answers(model, world, params, examples)
    return [text for text in own if text in known] or sorted(known)


def worded(
    world: worlds.World, rows: pools.Pool, responses: Sequence[str], order: str = ""
) -> pools.Pool:
    """The prompts of `rows` with other answers; one that is empty stays as it was."""
    return pools.encode(
        world.tokenizer,
        [
            dataclasses.replace(example, response=text or example.response)
            for example, text in zip(rows.examples, responses, strict=True)
        ],
        rows.tokens.shape[1],
        order=order or rows.order,
        pad_id=world.pad_id,
        truncate=True,
    )
