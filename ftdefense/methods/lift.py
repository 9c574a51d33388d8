"""Lifts the small function that a paper describes to a `Method`."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import optimizers
from ftdefense.objectives import losses

Direction = Callable[
    [types.Context, types.Params, Mapping[str, types.Batch], types.Rng],
    tuple[types.Params, types.Metrics],
]
# As `Direction`, with what the method remembers: (..., rng, memory) -> (..., memory).
Remembering = Callable[..., tuple[types.Params, types.Metrics, Any]]
Streams = Callable[[types.Hparams], Mapping[str, tuple[int, ...]]]


@struct.dataclass
class Hparams:
    """What every gradient method has; a method adds its own fields."""

    optimizer: optimizers.Optimizer = optimizers.Optimizer()
    adapter: Any = adapters.Full()
    microbatches: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class TrainState:
    """What a scan over steps carries.

    Attributes:
      params: what trains: full parameters or adapter factors.
      opt_state: of `hp.optimizer.transform()`.
      hp: hyperparameters; numbers are arrays, the schedule is its table.
      step: optimizer steps taken, int32.
      memory: what the method itself carries from step to step, or None.
    """

    params: types.Params
    opt_state: Any
    hp: types.Hparams
    step: jax.Array
    memory: Any = None


@struct.dataclass
class EditState:
    """State of a method without training: the edited parameters."""

    params: types.Params
    hp: types.Hparams


def context(
    model: types.Model,
    lineage: types.Lineage,
    hp: types.Hparams,
    step: jax.Array | int = 0,
) -> types.Context:
    """Binds the adapter, so that a direction sees one kind of parameters."""
    bound = hp.adapter.bind(model, lineage.current)
    return types.Context(
        loss=losses.next_token(bound, microbatches=hp.microbatches),
        model=bound,
        lineage=lineage,
        hp=hp,
        readout=hp.adapter.bind_readout(model, lineage.current),
        reference=functools.partial(model, lineage.current),
        step=step,
        steps=hp.optimizer.steps,
    )


def init_state(
    params: types.Params, hp: types.Hparams, memory: Any = None
) -> TrainState:
    """A fresh optimizer for `params`; the schedule must be a table already."""
    opt_state = hp.optimizer.transform().init(params)
    return TrainState(params, opt_state, hp, jnp.int32(0), memory)


def descend(
    state: TrainState, grads: types.Params, **extra: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step along `grads`, and the norms worth watching.

    `extra` goes to the optimizer: `active` to `adamw_by_leaf`.
    """
    grads = optax.tree.cast_like(grads, state.params)
    transform = optax.with_extra_args_support(state.hp.optimizer.transform())
    updates, opt_state = transform.update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    norms = {"norm/gradient": tree.norm(grads), "norm/update": tree.norm(updates)}
    state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
    return state, norms


def gradient_method(
    model: types.Model, direction: Direction, streams: Streams
) -> types.Method:
    """Lifts `direction(ctx, params, batches, rng) -> (grads, metrics)`.

    `init` expects `hp.optimizer.schedule` to be tabulated (`Optimizer.tabulate`).
    """

    def forgetful(ctx, params, batches, rng, memory):
        return *direction(ctx, params, batches, rng), memory

    return remembering_method(model, forgetful, streams, lambda *_: None)


def remembering_method(
    model: types.Model,
    direction: Remembering,
    streams: Streams,
    memory: Callable[[types.Context, types.Params, types.Rng], Any],
    active: Callable[[types.Context, types.Params, Any], Any] | None = None,
) -> types.Method:
    """Lifts `direction(ctx, params, batches, rng, memory) -> (grads, metrics, memory)`.

    `memory(ctx, params, rng)` is what it remembers at first: a pytree of arrays whose
    structure, shapes and dtypes `direction` keeps. `active(ctx, params, memory)`, with an
    optimizer of kind `adamw_by_leaf`, says what trains in a step (`methods.freezing`).
    """

    def init(lineage: types.Lineage, hp: types.Hparams, rng: types.Rng) -> TrainState:
        adapter_rng, memory_rng = rng, jax.random.fold_in(rng, 1)
        params = hp.adapter.init(lineage.current, adapter_rng)
        first = memory(context(model, lineage, hp), params, memory_rng)
        return init_state(params, hp, first)

    def step(state: TrainState, lineage: types.Lineage, batches, rng: types.Rng):
        ctx = context(model, lineage, state.hp, state.step)
        grads, metrics, after = direction(ctx, state.params, batches, rng, state.memory)
        extra = {}
        if active is not None:
            extra["active"] = active(ctx, state.params, after)
        state, norms = descend(state, grads, **extra)
        return state.replace(memory=after), {**metrics, **norms}

    def release(state: TrainState, lineage: types.Lineage) -> types.Release:
        hp = state.hp
        params = hp.optimizer.released(state.params, state.opt_state)
        return types.Release(hp.adapter.merge(params, lineage.current))

    return types.Method(streams, init, step, release)


@functools.cache
def supervised(model: types.Model, role: str) -> types.Method:
    """Plain fine-tuning on the batches of one role: nats per weighted token.

    Cached, so that every method which is plain fine-tuning shares one compilation.
    """

    def streams(hp: types.Hparams) -> Mapping[str, tuple[int, ...]]:
        del hp
        return {role: ()}

    def direction(ctx, params, batches, rng):
        loss, grads = jax.value_and_grad(ctx.loss)(params, batches[role], rng)
        return grads, {f"loss/{role}": loss}

    return gradient_method(model, direction, streams)


def weight_edit(
    edit: Callable[[types.Lineage, types.Hparams], types.Params],
) -> types.Method:
    """Lifts `edit(lineage, hp) -> params`: all happens in `init`, no step is taken."""

    def init(lineage: types.Lineage, hp: types.Hparams, rng: types.Rng) -> EditState:
        del rng
        return EditState(edit(lineage, hp), hp)

    def step(state: EditState, lineage: types.Lineage, batches, rng: types.Rng):
        del lineage, batches, rng
        return state, {}

    def release(state: EditState, lineage: types.Lineage) -> types.Release:
        del lineage
        return types.Release(state.params)

    return types.Method(lambda hp: {}, init, step, release)


def unchanged(lineage: types.Lineage, hp: types.Hparams) -> types.Params:
    """The edit that edits nothing: a copy, since states are donated."""
    del hp
    return jax.tree.map(jnp.copy, lineage.current)
