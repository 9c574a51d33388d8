"""Random mapping: turn every hidden state of a token towards a random vector of its own.

Source: TAR's first phase, Tamirisa et al. 2024, arXiv:2408.00761; code read at
rishub-tamirisa/tamper-resistance 19de233.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.objectives import distances
from ftdefense.objectives import lens
from ftdefense.objectives import parts

_EPSILON = 1e-8  # Least length that a state is divided by, as in PyTorch's cosine.


def vectors(tokens_BxL: jax.Array, width: int, seed: int | jax.Array = 0) -> jax.Array:
    """The standard normal vector of each token id, float32 [B, L, D].

    Rows of one frozen table [V, D] that is never stored: a row is drawn from
    (seed, token id) where it is needed.
    """
    key = jax.random.key(seed)

    def row(token: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, token), (width,), jnp.float32)

    rows = jax.vmap(row)(tokens_BxL.reshape(-1))  # One axis: sooner compiled.
    return rows.reshape(*tokens_BxL.shape, width)


def mismatch(outputs: types.Outputs, vectors_BxLxD: jax.Array) -> jax.Array:
    """Mean over layers and positions of `1 - |cos(hidden state, vector of its token)|`.

    All hidden states count, the embeddings among them, and all positions, padding too.
    Its gradient is finite (zero) where a state is zero.
    """
    hidden_NxBxLxD = lens.hidden_states(outputs)
    wide = jnp.promote_types(hidden_NxBxLxD.dtype, jnp.float32)
    hidden_NxBxLxD = hidden_NxBxLxD.astype(wide)
    vectors_1xBxLxD = vectors_BxLxD.astype(wide)[None]
    lengths = _length(hidden_NxBxLxD) * _length(vectors_1xBxLxD)
    cosines_NxBxL = jnp.sum(hidden_NxBxLxD * vectors_1xBxLxD, -1) / lengths
    return jnp.mean(1 - jnp.abs(cosines_NxBxL))


def random_mapping(
    model: Callable[..., types.Outputs], seed: int | jax.Array, microbatches: int = 1
) -> Callable[..., jax.Array]:
    """`loss(params, batch, rng)`: `mismatch` with the table of `seed`; weights ignored."""

    def loss(params: types.Params, batch: types.Batch, rng: types.Rng | None = None):
        def compute(batch, rng):
            seen = distances.attended(batch)
            outputs = model(params, batch.tokens, rng=rng, attended=seen)
            width = outputs.hidden["final"].shape[-1]
            return mismatch(outputs, vectors(batch.tokens, width, seed))

        return parts.summed(compute, batch, microbatches, rng) / microbatches

    return loss


def _length(x: jax.Array) -> jax.Array:
    # The floor is inside the root: its gradient at zero is then zero, not infinite.
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1), _EPSILON**2))
