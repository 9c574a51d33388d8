"""Simulated attacks on open weights: AdamW steps that no gradient passes through.

Source: the adversaries of TAR, Tamirisa et al. 2024, arXiv:2408.00761; code read at
rishub-tamirisa/tamper-resistance 19de233.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import tree
from ftdefense.core import types


@struct.dataclass
class Mix:
    """Adversaries with a fresh AdamW, all of whose numbers are drawn anew each time.

    Some switch: they train on other rows for floor(K * Beta(a, b)) of their K steps.
    """

    learning_rates: tuple[float, ...] = (2e-6, 2e-5, 4e-5)  # Equally likely.
    weight_decay: float = 0.01  # Decoupled, on all that trains: PyTorch's default.
    switch_share: float = 1 / 3  # Probability of an adversary that switches.
    switch_a: float = 6.0
    switch_b: float = 3.0

    def draw(
        self, rng: types.Rng, rows: types.Batch, before: types.Batch
    ) -> tuple[optax.GradientTransformation, types.Batch]:
        """Optimizer and rows [K, ...] of one adversary; `before` until it switches."""
        rng_rate, rng_kind, rng_switch = jax.random.split(rng, 3)
        count = rows.tokens.shape[0]
        rate = jax.random.choice(rng_rate, jnp.asarray(self.learning_rates))
        switches = jax.random.bernoulli(rng_kind, self.switch_share)
        share = jax.random.beta(rng_switch, self.switch_a, self.switch_b)
        switch = jnp.where(switches, jnp.floor(count * share), 0.0)
        early = jnp.arange(count)[:, None, None] < switch
        rows = jax.tree.map(lambda b, r: jnp.where(early, b, r), before, rows)
        return optax.adamw(rate, weight_decay=self.weight_decay), rows


@struct.dataclass
class Task:
    """What simulated attacks see and are judged by.

    Attributes:
      rows: batches that an adversary trains on [..., K, B, L].
      before: the same, until it switches.
      heldout: what judges its weights.
      rng: of the adversary, and of all losses.
    """

    rows: types.Batch
    before: types.Batch
    heldout: Any
    rng: types.Rng


def gradients_along(
    mix: Mix,
    loss: Callable[..., jax.Array],
    judge: Callable[[Any], Callable[..., jax.Array]],
    params: types.Params,
    tasks: Task,
    weights_K: jax.Array,
    every: int,
) -> tuple[types.Params, jax.Array]:
    """Weighted gradients of what `judge` says, at points along T attacks from `params`.

    First order: gradients at the attacked weights, for use at `params`. Only every
    `every`-th of the K steps is judged; the steps after the last one are not taken.

    Args:
      mix: the adversaries.
      loss: what they descend on: (params, batch, rng) -> scalar.
      judge: heldout -> loss(params, rng).
      params: where each attack starts.
      tasks: leaves [T, ...].
      weights_K: of the judged losses; entry k is that of the weights after step k.
      every: steps from one gradient to the next.

    Returns:
      (sum of weighted gradients in float32 or wider, sum of weighted losses).
    """
    steps = weights_K.shape[0]
    blocks = steps // every

    def in_blocks(x):
        return x[: blocks * every].reshape(blocks, every, *x.shape[1:])

    def attack(total, task):
        rng_draw, rng_steps, rng_judge = jax.random.split(task.rng, 3)
        optimizer, rows = mix.draw(rng_draw, task.rows, task.before)
        judged = jax.value_and_grad(judge(task.heldout))

        def step(carry, xs):
            (theta, state), (batch, rng) = carry, xs
            # Kept in float32 or wider, evaluated in the precision of the model.
            grads = jax.grad(loss)(optax.tree.cast_like(theta, params), batch, rng)
            updates, state = optimizer.update(tree.wide(grads), state, theta)
            return (optax.apply_updates(theta, updates), state), None

        def block(carry, xs):
            (attacked, total), (rows, rngs, weights, rng) = carry, xs
            attacked, _ = jax.lax.scan(step, attacked, (rows, rngs))
            there = optax.tree.cast_like(attacked[0], params)
            value, grads = judged(there, rng)
            total = tree.add_scale(total, weights[-1], grads)
            return (attacked, total), weights[-1] * value

        rngs = jax.random.split(rng_steps, steps)
        xs = jax.tree.map(in_blocks, (rows, rngs, weights_K))
        xs = (*xs, jax.random.split(rng_judge, blocks))
        start = tree.wide(params)
        carry = ((start, optimizer.init(start)), total)
        (_, total), values = jax.lax.scan(block, carry, xs)
        return total, jnp.sum(values)

    total = jax.tree.map(jnp.zeros_like, tree.wide(params))
    total, values = jax.lax.scan(attack, total, tasks)
    return total, jnp.sum(values)
