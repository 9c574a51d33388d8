"""What a release answers to a list of prompts."""

from collections.abc import Sequence

import jax
import numpy as np

from ftdefense.core import types
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import world as worlds
from ftdefense.models import generate
from ftdefense.models import transformer


class Answers:
    """Prompts, tokenised once; every call runs the same compiled program."""

    def __init__(
        self,
        model: transformer.LanguageModel,
        world: worlds.World,
        examples: Sequence[data_examples.Example],
        *,
        prefills: Sequence[str] | None = None,
        batch_size: int = 256,
        temperature: float = 0.0,
    ):
        """Prepares prompts.

        Args:
          prefills: what each answer is made to begin with; it is part of the answer.
          batch_size: rows generated together; the last batch repeats some.
          temperature: 0 for greedy.
        """
        self._model, self._world, self._temperature = model, world, temperature
        self._prefills = list(prefills or [""] * len(examples))
        prompts = pools.encode_prompts(
            world.tokenizer, examples, pad_id=world.pad_id, prefills=self._prefills
        )
        self._count = len(examples)
        size = min(batch_size, self._count)
        rows = np.arange(-(-self._count // size) * size) % self._count
        self._batches = [
            (prompts.tokens[part], prompts.mask[part])
            for part in rows.reshape(-1, size)
        ]

    def __len__(self) -> int:
        return self._count

    def __call__(self, release: types.Release, seed: int = 0) -> list[str]:
        """One answer to each prompt, special tokens removed."""
        world = self._world
        key = jax.random.key(seed)
        rows = [
            generate.generate(
                self._model,
                release.params,
                tokens,
                mask,
                jax.random.fold_in(key, i),
                max_new_tokens=world.max_new_tokens,
                eos_ids=world.eos_ids,
                pad_id=world.pad_id,
                temperature=self._temperature,
                intervene=release.intervene,
                taps=release.taps,
            )
            for i, (tokens, mask) in enumerate(self._batches)
        ]
        ids = np.concatenate([np.asarray(row) for row in rows])[: self._count]
        said = world.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            f"{prefill} {text}".strip()
            for prefill, text in zip(self._prefills, said, strict=True)
        ]
