"""Methods one step of which is a phase: an attack, then several optimizer steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers

# (ctx, params, batches, rng, memory) -> (params, metrics, memory).
Phase = Callable[..., tuple[types.Params, types.Metrics, Any]]
# (params, one slice of xs) -> (grads, metrics).
Gradient = Callable[[types.Params, Any], tuple[types.Params, types.Metrics]]


def phased_method(
    model: types.Model,
    phase: Phase,
    streams: lift.Streams,
    memory: Callable[[types.Context, types.Params, types.Rng], Any] = lambda *_: None,
) -> types.Method:
    """Lifts a phase: steps, and so the schedule's entries, count phases.

    What the optimizer remembers is the phase's business: a local variable where it
    starts anew (`descend`), part of the memory where it does not.
    """

    def init(lineage: types.Lineage, hp: types.Hparams, rng: types.Rng):
        params = hp.adapter.init(lineage.current, rng)
        ctx = lift.context(model, lineage, hp)
        first = memory(ctx, params, jax.random.fold_in(rng, 1))
        return lift.TrainState(params, None, hp, jnp.int32(0), first)

    def step(state: lift.TrainState, lineage: types.Lineage, batches, rng: types.Rng):
        ctx = lift.context(model, lineage, state.hp, state.step)
        params, metrics, after = phase(ctx, state.params, batches, rng, state.memory)
        state = state.replace(params=params, step=state.step + 1, memory=after)
        return state, metrics

    def release(state: lift.TrainState, lineage: types.Lineage) -> types.Release:
        return types.Release(state.hp.adapter.merge(state.params, lineage.current))

    return types.Method(streams, init, step, release)


def descend(
    optimizer: optimizers.Optimizer,
    params: types.Params,
    gradient: Gradient,
    xs: Any,
    opt_state: Any = None,
) -> tuple[types.Params, types.Metrics, Any]:
    """Scans optimizer steps over the leading axis of `xs`; metrics are their means.

    Args:
      optimizer: its schedule has an entry for every step that `opt_state` counts.
      params: where it starts.
      gradient: along which each step goes.
      xs: a pytree with leading axis K.
      opt_state: None: a fresh one.
    """
    transform = optimizer.transform()
    opt_state = transform.init(params) if opt_state is None else opt_state
    hp = lift.Hparams(optimizer)

    def body(carry, x):
        params, opt_state = carry
        grads, metrics = gradient(params, x)
        state = lift.TrainState(params, opt_state, hp, jnp.int32(0))
        state, norms = lift.descend(state, grads)
        return (state.params, state.opt_state), {**metrics, **norms}

    (params, opt_state), metrics = jax.lax.scan(body, (params, opt_state), xs)
    return params, jax.tree.map(jnp.mean, metrics), opt_state


def stretched(optimizer: optimizers.Optimizer, count: int) -> optimizers.Optimizer:
    """Its table of phases as one of `count` steps a phase: [phases * count + 1]."""
    table = optimizer.schedule
    steps = jnp.arange(optimizer.steps * count + 1) / count
    phases = jnp.arange(table.shape[-1])
    return optimizer.replace(schedule=jnp.interp(steps, phases, table))


def restarted(
    optimizer: optimizers.Optimizer, count: int, phase: jax.Array | int
) -> optimizers.Optimizer:
    """The part of `stretched` that belongs to one phase, for a fresh optimizer."""
    table = stretched(optimizer, count).schedule
    part = jax.lax.dynamic_slice(table, (phase * count,), (count + 1,))
    return optimizer.replace(schedule=part)


def constant(
    optimizer: optimizers.Optimizer, learning_rate: float | jax.Array, count: int
) -> optimizers.Optimizer:
    """The same at a constant rate for `count` steps: a simulated attacker's."""
    return optimizer.replace(learning_rate=learning_rate, schedule=jnp.ones(count + 1))
