"""The one jit boundary of training: `jit(scan(step))` over a chunk of steps."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import streams as data_streams
from ftdefense.models import sharding
from ftdefense.training import checkpoint
from ftdefense.training import threads

# Chunks in a stage: where it is logged, saved, and may be evaluated.
CHUNKS = 16


class Progress(NamedTuple):
    """What a chunk's end reports.

    Attributes:
      done: steps taken.
      steps: steps in all.
      metrics: {name: float array [steps of this chunk] or [S, steps]}.
      state: the method's state now; read it, do not keep it: it is donated next.
    """

    done: int
    steps: int
    metrics: Mapping[str, np.ndarray]
    state: types.State


# `mapped` where members have lineages of their own, [S, ...]; True: they share one.
STACKED = "stacked"


@functools.partial(
    jax.jit, static_argnames=("step", "mapped", "placement"), donate_argnames=("state",)
)
def run_chunk(
    step: Callable[..., Any],
    mapped: bool | str,
    state: types.State,
    lineage: types.Lineage,
    batches: Mapping[str, types.Batch],
    rng: types.Rng,
    first: jax.Array,
    placement: sharding.Placement | None = None,
) -> tuple[types.State, types.Metrics]:
    """Scans `step` over the leading axis of `batches`; step i gets `fold_in(rng, i)`.

    With `mapped`, state, batches and rng have a leading axis S over seeds and
    settings, and the scan is vmapped over it; the lineage is shared, unless `mapped`
    is `STACKED`. With a placement the state ends where it began: the next chunk is
    the same program.
    """

    def run(state, lineage, batches, rng):
        count = jax.tree.leaves(batches)[0].shape[0]

        def body(state, xs):
            i, batch = xs
            return step(state, lineage, batch, jax.random.fold_in(rng, i))

        return jax.lax.scan(body, state, (first + jnp.arange(count), batches))

    run = _map(run, mapped, (0, None, 0, 0))
    state, metrics = run(state, lineage, batches, rng)
    return placement.constrain(state) if placement else state, metrics


def _map(run, mapped, axes):
    """`run` vmapped over `axes`, or over all arguments where lineages are stacked."""
    if not mapped:
        return run
    return jax.vmap(run, in_axes=0 if mapped == STACKED else axes)


@functools.partial(jax.jit, static_argnames=("init", "mapped", "placement"))
def _init(init, mapped, placement, lineage, hp, rng):
    state = _map(init, mapped, (None, 0, 0))(lineage, hp, rng)
    return placement.constrain(state) if placement else state


def init(
    method: types.Method,
    lineage: types.Lineage,
    hp: types.Hparams,
    rng: types.Rng,
    steps: int,
    *,
    mapped: bool | str = False,
    placement: sharding.Placement | None = None,
) -> types.State:
    """The first state; numeric hyperparameters become arrays, the schedule a table.

    With a placement no device holds all of it, not even for a moment.
    """
    hp = jax.tree.map(jnp.asarray, tabulate(hp, steps, mapped=mapped))
    return _init(method.init, mapped, placement, lineage, hp, rng)


def tabulate(
    hp: types.Hparams, steps: int, *, mapped: bool | str = False
) -> types.Hparams:
    """Replaces every optimizer's schedule in `hp` by its values at each step."""
    if not hasattr(hp, "optimizer"):
        return hp
    table = functools.partial(_table, steps=steps)
    return hp.replace(optimizer=(jax.vmap(table) if mapped else table)(hp.optimizer))


def _table(optimizer: Any, steps: int) -> Any:
    return optimizer.tabulate(steps)


def boundaries(steps: int, chunks: int = CHUNKS) -> list[int]:
    """Steps at which chunks end: multiples of ceil(steps / chunks), then the last.

    A program is compiled for each length of a chunk: where chunks an eighth longer, at
    most, leave no shorter one at the end, they are so long.
    """
    least = max(1, -(-steps // chunks))
    sizes = range(least, least + least // 8 + 1)
    size = next((size for size in sizes if steps % size == 0), least)
    return [*range(size, steps, size), steps] if steps else []


def train(
    method: types.Method,
    state: types.State,
    lineage: types.Lineage,
    streams: Mapping[str, data_streams.Stream] | list[Mapping[str, Any]],
    rng: types.Rng,
    steps: int,
    *,
    saver: checkpoint.Saver | None = None,
    on_chunk: Callable[[Progress], Any] | None = None,
    mapped: bool | str = False,
    placement: sharding.Placement | None = None,
) -> tuple[types.State, list[Any]]:
    """Runs `steps` steps from `state`; resumes from `saver` if it holds a later one.

    Args:
      streams: {role: Stream}; with `mapped`, one such mapping for each of S members.
      rng: typed key, [S] with `mapped`.
      mapped: whether there is an axis S; `STACKED` if the lineage has it, too.
      placement: of state and batches on several devices; None: on one.
      saver: where (state, step, key, log) is saved at the end of chunks.
      on_chunk: its JSON-able results are the returned log, one entry a chunk; they are
        saved with the state, so a resumed run has them all.

    Returns:
      The last state and the log.

    Raises:
      NonFiniteError: if a metric is NaN or infinite; names step and metric, and the
        last good checkpoint, which is kept.
    """
    log: list[Any] = []
    done = 0
    if saver is not None:
        state, rng, done, log = saver.restore(state, rng)
    for end in boundaries(steps):
        if end <= done:
            continue
        batches = _batches(streams, done, end - done, mapped)
        if placement:
            batches = placement.batches(batches)
        with threads.one_for_lapack():
            state, metrics = run_chunk(
                method.step,
                mapped,
                state,
                lineage,
                batches,
                rng,
                jnp.int32(done),
                placement,
            )
            metrics = jax.device_get(metrics)
        if not mapped:
            _check_finite(metrics, done, saver)
        done = end
        if on_chunk is not None:
            log.append(on_chunk(Progress(done, steps, metrics, state)))
        if saver is not None and done < steps:
            saver.save(state, rng, done, log)
    return state, log


def _batches(streams: Any, first: int, count: int, mapped: bool | str) -> Any:
    if not mapped:
        return {role: stream.chunk(first, count) for role, stream in streams.items()}
    members = [_batches(member, first, count, False) for member in streams]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def _check_finite(
    metrics: Mapping[str, np.ndarray], first: int, saver: checkpoint.Saver | None
) -> None:
    bad = {
        name: int(np.argmin(np.isfinite(values)))
        for name, values in metrics.items()
        if not np.all(np.isfinite(values))
    }
    if not bad:
        return
    name = min(bad, key=bad.get)
    kept = saver.last() if saver is not None else None
    where = f"the last good checkpoint is {kept}" if kept else "nothing was saved yet"
    raise errors.NonFiniteError(
        f"{name} is {metrics[name][bad[name]]} at step {first + bad[name]}; {where}. "
        "Lower optimizer.learning_rate or set optimizer.clip, then run again."
    )
