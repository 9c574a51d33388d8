"""What a release answers to a list of prompts."""

from collections.abc import Sequence

import jax
import numpy as np

from ftdefense.core import types
from ftdefense.data import examples as data_examples
from ftdefense.data import pools
from ftdefense.data import world as worlds
from ftdefense.models import generate
from ftdefense.models import sharding
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
        batch_size: int | None = None,
        temperature: float = 0.0,
    ):
        """Prepares prompts.

        Args:
          prefills: what each answer is made to begin with; it is part of the answer.
          batch_size: rows generated together; None: as many as the world says. The
            last batch repeats some.
          temperature: 0 for greedy.
        """
        self._model, self._world, self._temperature = model, world, temperature
        self._prefills = list(prefills or [""] * len(examples))
        prompts = pools.encode_prompts(
            world.tokenizer, examples, pad_id=world.pad_id, prefills=self._prefills
        )
        self._count = len(examples)
        size = min(batch_size or world.eval_batch_size, self._count)
        rows = np.arange(-(-self._count // size) * size) % self._count
        self._batches = [
            (prompts.tokens[part], prompts.mask[part])
            for part in rows.reshape(-1, size)
        ]

    def __len__(self) -> int:
        return self._count

    def __call__(self, release: types.Release, seed: int = 0) -> list[str]:
        """One answer to each prompt, special tokens removed."""
        return self.part(release, 0, self._count, seed)

    def part(
        self, release: types.Release, first: int, last: int, seed: int = 0
    ) -> list[str]:
        """Answers to the prompts `first` to `last` - 1, as a whole call gives them.

        Batches that they share in are generated whole.
        """
        world = self._world
        key = jax.random.key(seed)
        size = len(self._batches[0][0])
        begin, end = first // size, -(-last // size)
        rows = [
            generate.generate(
                self._model,
                release.params,
                *sharding.beside(release.params, self._batches[i]),
                jax.random.fold_in(key, i),
                max_new_tokens=world.max_new_tokens,
                eos_ids=world.eos_ids,
                pad_id=world.pad_id,
                temperature=self._temperature,
                intervene=release.intervene,
                taps=release.taps,
            )
            for i in range(begin, end)
        ]
        ids = np.concatenate([np.asarray(row) for row in rows])
        ids = ids[first - begin * size : last - begin * size]
        said = world.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            f"{prefill} {text}".strip()
            for prefill, text in zip(self._prefills[first:last], said, strict=True)
        ]
