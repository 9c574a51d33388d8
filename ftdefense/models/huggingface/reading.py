"""Reads the folders of transformers: config.json and safetensors."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np
import safetensors

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.models import transformer
from ftdefense.models.huggingface import layout

_DTYPES = ("F32", "F16", "BF16")


def load(
    folder: str | os.PathLike, **overrides: Any
) -> tuple[transformer.LanguageModel, types.Params]:
    """A folder's model and its parameters in float32, on the host.

    Where they go is the caller's: on one device, or spread over a mesh. Files are
    memory-mapped and read tensor by tensor: beside the parameters, no more than one
    stacked parameter is held.

    Args:
      folder: with config.json and model.safetensors, or shards with their index;
        tensors are float32, bfloat16 or float16.
      **overrides: fields of `ModelConfig`, as compute_dtype="bfloat16".

    Raises:
      UserError: for an unsupported config, for missing, extra, misshapen or mistyped
        tensors, and for files that cannot be read; names folder, file and tensor.
    """
    folder = pathlib.Path(folder)
    config = layout.read_config(folder)
    known = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            raise errors.unknown("field of ModelConfig", name, known)
    model = transformer.LanguageModel(dataclasses.replace(config, **overrides))
    wanted = list(layout.tensors(model))
    with contextlib.ExitStack() as stack:
        found = _open(folder, stack)
        _check_names(folder, found, wanted, config.tied)
        for tensor in wanted:
            _check_tensor(found[tensor.name], tensor)
        if config.tied and layout.HEAD in found:
            _check_tied(found)
        return model, _read_params(found, wanted, layout.shapes(model))


class Opened(NamedTuple):
    """An open safetensors file and where it is."""

    path: pathlib.Path
    file: Any


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Opened]:
    """The open file of each tensor that the folder holds."""
    if (folder / layout.INDEX).is_file():
        index = layout.read_json(folder / layout.INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise errors.UserError(
                f"{folder / layout.INDEX} has no weight_map; download the file again."
            )
        names = sorted(set(index.values()))
    elif (folder / layout.WEIGHTS).is_file():
        names, index = [layout.WEIGHTS], None
    else:
        others = sorted(p.name for p in folder.glob("*.bin"))
        held = f"only {others[0]}" if others else "neither"
        raise errors.UserError(
            f"{folder}: expected {layout.WEIGHTS} or {layout.INDEX}, found {held}; "
            "write the folder with transformers' save_pretrained."
        )
    found: dict[str, Opened] = {}
    for name in names:
        opened = _open_file(folder / name, stack)
        found |= dict.fromkeys(opened.file.keys(), opened)
    for tensor, name in (index or {}).items():
        if tensor not in found or found[tensor].path.name != name:
            raise errors.UserError(
                f"{folder / name} lacks tensor {tensor}, which {layout.INDEX} says it "
                "holds; download both files again."
            )
    return found


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> Opened:
    if not path.is_file():
        raise errors.UserError(
            f"{path} not found, though {layout.INDEX} names it; download the missing "
            "shard."
        )
    try:
        # On the host; numpy knows bfloat16 because jax has imported ml_dtypes.
        file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UserError(
            f"{path} is not a whole safetensors file ({error}); download it again "
            "(with git: git lfs pull)."
        ) from error
    return Opened(path, file)


def _check_names(
    folder: pathlib.Path,
    found: dict[str, Opened],
    wanted: list[layout.Tensor],
    tied: bool,
) -> None:
    names = {tensor.name for tensor in wanted}
    missing = [tensor.name for tensor in wanted if tensor.name not in found]
    if missing:
        files = sorted({opened.path.name for opened in found.values()})
        raise errors.UserError(
            f"{folder}: tensor {missing[0]} ({len(missing)} in all) is missing from "
            f"{', '.join(files) or 'its empty files'}; {layout.CONFIG} belongs to "
            "another checkpoint or the download is incomplete: download the folder "
            "again."
        )
    extra = sorted(
        name
        for name in set(found) - names
        # Old checkpoints store the frequencies, and some a tied head.
        if not name.endswith("rotary_emb.inv_freq")
        and not (tied and name == layout.HEAD)
    )
    if extra:
        raise errors.UserError(
            f"{found[extra[0]].path}: tensor {extra[0]} ({len(extra)} in all) is not "
            f"part of the model in {layout.CONFIG}; use the {layout.CONFIG} that was "
            "published with these weights."
        )


def _check_tensor(opened: Opened, tensor: layout.Tensor) -> None:
    view = opened.file.get_slice(tensor.name)
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if shape != tensor.shape:
        raise errors.UserError(
            f"{opened.path}: tensor {tensor.name} is {list(shape)}, but "
            f"{layout.CONFIG} asks for {list(tensor.shape)}; use the {layout.CONFIG} "
            "that was published with these weights."
        )
    if dtype not in _DTYPES:
        raise errors.UserError(
            f"{opened.path}: tensor {tensor.name} is {dtype}, not one of "
            f"{', '.join(_DTYPES)}; use an unquantised checkpoint."
        )


def _check_tied(found: dict[str, Opened]) -> None:
    head, embedding = (
        found[name].file.get_tensor(name) for name in (layout.HEAD, layout.EMBEDDING)
    )
    if not np.array_equal(head, embedding):
        raise errors.UserError(
            f"{found[layout.HEAD].path}: tensor {layout.HEAD} differs from "
            f"{layout.EMBEDDING}, though {layout.CONFIG} ties them; set "
            "tie_word_embeddings to false there."
        )


def _read_params(
    found: dict[str, Opened],
    wanted: list[layout.Tensor],
    shapes: dict[tuple[str, ...], tuple[int, ...]],
) -> types.Params:
    params: dict[str, Any] = {}
    for path, parts in itertools.groupby(wanted, key=lambda tensor: tensor.path):
        whole = np.empty(shapes[path], np.float32)
        for tensor in parts:
            value = found[tensor.name].file.get_tensor(tensor.name)
            if not np.isfinite(value).all():
                raise errors.UserError(
                    f"{found[tensor.name].path}: tensor {tensor.name} holds numbers that "
                    "are not finite; export or download the weights again."
                )
            target = whole if tensor.layer is None else whole[tensor.layer]
            target[...] = value.T if tensor.transposed else value
        *parents, name = path
        nested = params
        for parent in parents:
            nested = nested.setdefault(parent, {})
        nested[name] = whole
    return params
