"""TokenBuncher's token noiser: targets that keep an answer and add noise to its rivals.

Source: Feng et al. 2025, arXiv:2508.20697; code read at Georgefwt/Token-Buncher c0d2651
(specs: perturbation_and_meta 5.4). TokenBuncher itself defends against reinforcement
learning and is no module here; its supervised half is this loss.
"""

import jax
import jax.numpy as jnp

from ftdefense.core import types


def targets(
    rng: types.Rng,
    target_ids: jax.Array,
    vocab_size: int,
    noise: float = 0.1,
    as_shipped: bool = False,
) -> jax.Array:
    """`(1 - noise)` on each target, `noise` over all other tokens at random, [..., V].

    The noise is uniform in [0, 1) before it is normalised. With `as_shipped` it is
    multiplied by `noise` once more, as the code does: weights of 0.91 in all for 0.1.
    """
    dtype = jnp.result_type(float)
    onehot = jax.nn.one_hot(target_ids, vocab_size, dtype=dtype)
    drawn = jax.random.uniform(rng, onehot.shape, dtype) * (1 - onehot)
    drawn = drawn / jnp.sum(drawn, -1, keepdims=True)
    mass = noise * noise if as_shipped else noise
    return (1 - noise) * onehot + mass * drawn


def cross_entropy(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Nats of `weights` [..., V], which need not sum to 1, under the logits."""
    return -jnp.sum(weights * jax.nn.log_softmax(logits), -1)
