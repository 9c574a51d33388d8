"""A guard that reads what the user of a service submits, and stops what looks harmful.

DESIGN, numbers included: a small classifier of token counts, as specs/attacks.md B.19 has
it for a toy, for LlamaGuard-2.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftdefense.data import pools
from ftdefense.data import world as worlds

PENALTY = 1e-3  # Of the squared weights, beside nats per row.
STEPS, RATE = 300, 0.1  # Of Adam, on all rows at once.


@struct.dataclass
class Guard:
    """Logistic regression on counts of tokens: nats of log-odds that a row is harmful."""

    tokens_V: jax.Array  # What one of each token adds.
    bias: jax.Array

    def log_odds(self, counts: jax.Array) -> jax.Array:
        """Of rows with these counts, [..., V] -> [...]."""
        return self.bias + counts @ self.tokens_V

    def loss(self, counts: jax.Array) -> jax.Array:
        """-log P(safe)."""
        return jax.nn.softplus(self.log_odds(counts))


def counts(pool: pools.Pool, size: int) -> np.ndarray:
    """How often each row has each token, up to the end of its answer, [rows, size]."""
    real = np.cumsum(pool.weights[:, ::-1], axis=1)[:, ::-1] > 0
    found = np.zeros((len(pool), size), np.float32)
    row, _ = np.nonzero(real)
    np.add.at(found, (row, pool.tokens[real]), 1)
    return found


def fit(world: worlds.World, size: int) -> Guard:
    """The provider's: from its own harmful and benign rows, which weigh the same.

    Args:
      size: of the vocabulary.
    """
    sides = [counts(world.defender[role], size) for role in ("harmful", "benign")]

    def loss(guard: Guard) -> jax.Array:
        stopped, passed = (guard.log_odds(side) for side in sides)
        wrong = jax.nn.softplus(-stopped).mean() + jax.nn.softplus(passed).mean()
        return wrong + PENALTY * jnp.sum(guard.tokens_V**2)

    transform = optax.adam(RATE)

    def step(carry, _):
        guard, state = carry
        updates, state = transform.update(jax.grad(loss)(guard), state)
        return (optax.apply_updates(guard, updates), state), None

    @jax.jit
    def descend(guard: Guard) -> Guard:
        start = guard, transform.init(guard)
        return jax.lax.scan(step, start, None, length=STEPS)[0][0]

    return descend(Guard(jnp.zeros(size), jnp.float32(0)))


def passes(guard: Guard, pool: pools.Pool) -> np.ndarray:
    """Which rows the guard lets through: those more probably safe than not, [rows]."""
    odds = guard.log_odds(jnp.asarray(counts(pool, len(guard.tokens_V))))
    return np.asarray(odds < 0)
