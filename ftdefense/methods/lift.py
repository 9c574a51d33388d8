"""Lifts the small function that a paper describes to a `Method`."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any

from flax import struct
import jax
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
      opt_state: of `hp.optimizer.transform()`; counts the steps.
      hp: hyperparameters; numbers are arrays, the schedule is its table.
    """

    params: types.Params
    opt_state: Any
    hp: types.Hparams


@struct.dataclass
class EditState:
    """State of a method without training: the edited parameters."""

    params: types.Params
    hp: types.Hparams


def context(
    model: types.Model, lineage: types.Lineage, hp: types.Hparams
) -> types.Context:
    """Binds the adapter, so that a direction sees one kind of parameters."""
    bound = hp.adapter.bind(model, lineage.current)
    loss = losses.next_token(bound, microbatches=hp.microbatches)
    return types.Context(loss, bound, lineage, hp)


def init_state(params: types.Params, hp: types.Hparams) -> TrainState:
    """A fresh optimizer for `params`; the schedule must be a table already."""
    return TrainState(params, hp.optimizer.transform().init(params), hp)


def descend(
    state: TrainState, grads: types.Params
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step along `grads`, and the norms worth watching."""
    grads = optax.tree.cast_like(grads, state.params)
    transform = state.hp.optimizer.transform()
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"norm/gradient": tree.norm(grads), "norm/update": tree.norm(updates)}
    return state.replace(params=params, opt_state=opt_state), norms


def gradient_method(
    model: types.Model, direction: Direction, streams: Streams
) -> types.Method:
    """Lifts `direction(ctx, params, batches, rng) -> (grads, metrics)`.

    `init` expects `hp.optimizer.schedule` to be tabulated (`Optimizer.tabulate`).
    """

    def init(lineage: types.Lineage, hp: types.Hparams, rng: types.Rng) -> TrainState:
        return init_state(hp.adapter.init(lineage.current, rng), hp)

    def step(state: TrainState, lineage: types.Lineage, batches, rng: types.Rng):
        ctx = context(model, lineage, state.hp)
        grads, metrics = direction(ctx, state.params, batches, rng)
        state, norms = descend(state, grads)
        return state, {**metrics, **norms}

    def release(state: TrainState, lineage: types.Lineage) -> types.Release:
        return types.Release(state.hp.adapter.merge(state.params, lineage.current))

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
