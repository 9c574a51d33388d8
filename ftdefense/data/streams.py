"""Batches as a pure function of the step: nothing to save, nothing to resume."""

import dataclasses
import functools
import math
import zlib

import numpy as np

from ftdefense.core import types
from ftdefense.data import pools


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Epoch-wise shuffled batches of one role.

    Every epoch is a permutation of the rows, drawn from (seed, pool.order, epoch); a
    batch that crosses its end goes on in the next. Streams of equal seed, order and
    size draw the same rows, which keeps paired pools paired.

    Attributes:
      pool: the rows.
      batch_size: B.
      leading: shape before B, as (T, K); one step consumes their product of batches.
      seed: of the order.
    """

    pool: pools.Pool
    batch_size: int
    leading: tuple[int, ...] = ()
    seed: int = 0

    @functools.cached_property
    def rows_per_step(self) -> int:
        return math.prod(self.leading) * self.batch_size

    def rows(self, step: int) -> np.ndarray:
        """Row indices, int [*leading, B], of step `step` (from 0)."""
        first = step * self.rows_per_step
        drawn = np.arange(first, first + self.rows_per_step)
        epochs, places = np.divmod(drawn, len(self.pool))
        rows = np.empty(self.rows_per_step, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._permutation(int(epoch))[places[chosen]]
        return rows.reshape(*self.leading, self.batch_size)

    def _permutation(self, epoch: int) -> np.ndarray:
        return _permutation(
            self.seed, zlib.crc32(self.pool.order.encode()), epoch, len(self.pool)
        )

    def batch(self, step: int) -> types.Batch:
        """NumPy arrays [*leading, B, L]."""
        rows = self.rows(step)
        return types.Batch(self.pool.tokens[rows], self.pool.weights[rows])

    def chunk(self, first: int, count: int) -> types.Batch:
        """Batches of steps first .. first + count - 1, stacked: [count, *leading, B, L]."""
        rows = np.stack([self.rows(first + i) for i in range(count)])
        return types.Batch(self.pool.tokens[rows], self.pool.weights[rows])


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, order: int, epoch: int, size: int) -> np.ndarray:
    sequence = np.random.SeedSequence([seed, order, epoch])
    return np.random.Generator(np.random.Philox(sequence)).permutation(size)
