"""Orbax checkpoints of a stage: resumable while it runs, one release when it ends."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from ftdefense.core import errors
from ftdefense.core import types


class Saver:
    """Saves (state, step, key, log) of a running stage, atomically, and restores it.

    Data position needs no field of its own: streams are functions of the step.
    """

    def __init__(self, folder: pathlib.Path, every_seconds: float = 2.0):
        """`every_seconds`: saves closer together than this are skipped."""
        self._folder = folder
        self._every_seconds = every_seconds
        self._saved_at = time.monotonic()
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, enable_async_checkpointing=False
            ),
        )

    def last(self) -> pathlib.Path | None:
        """Folder of the last complete checkpoint, or None."""
        step = self._manager.latest_step()
        return None if step is None else self._folder / str(step)

    def save(self, state: types.State, rng: types.Rng, step: int, log: list) -> None:
        if time.monotonic() - self._saved_at < self._every_seconds:
            return
        item = {"state": _leaves(state), "key": jax.random.key_data(rng)}
        with _on_disk(self._folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    train=ocp.args.StandardSave(item),
                    log=ocp.args.JsonSave({"step": step, "log": log}),
                ),
            )
        self._saved_at = time.monotonic()

    def restore(
        self, state: types.State, rng: types.Rng
    ) -> tuple[types.State, types.Rng, int, list]:
        """The saved (state, key, step, log); the given ones at step 0 if none is."""
        step = self._manager.latest_step()
        if step is None:
            return state, rng, 0, []
        item = {"state": _leaves(state), "key": jax.random.key_data(rng)}
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                train=ocp.args.StandardRestore(jax.tree.map(_abstract, item)),
                log=ocp.args.JsonRestore(),
            ),
        )
        state = jax.tree.unflatten(
            jax.tree.structure(state), list(saved.train["state"].values())
        )
        rng = jax.random.wrap_key_data(saved.train["key"])
        return state, rng, saved.log["step"], list(saved.log["log"])

    def close(self) -> None:
        self._manager.close()


@contextlib.contextmanager
def _on_disk(folder: pathlib.Path) -> Iterator[None]:
    """Says what a full disk is; TensorStore has no kind of error for it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "No space left" not in str(error):
            raise
        raise errors.UserError(
            f"no space left for {folder}; free some, and the same command goes on."
        ) from error


def _leaves(state: types.State) -> dict[str, Any]:
    """Leaves under sortable names: the structure is the code's, not the file's."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def save_params(folder: pathlib.Path, params: types.Params) -> None:
    """Writes parameters; `folder` appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with _on_disk(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary.absolute(), params)
        checkpointer.wait_until_finished()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_params(folder: pathlib.Path, like: types.Params) -> types.Params:
    """Reads parameters of the shapes of `like` (arrays or ShapeDtypeStructs).

    What has no sharding goes to the first device, wherever it was saved from.

    Raises:
      UserError: if the folder does not hold them.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here),
        like,
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise errors.UserError(
            f"checkpoint {folder} cannot be read ({reason}); delete the folder to "
            "have the stage run again."
        ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON; the file appears whole or not at all, whoever else writes it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)
