"""Writes folders that transformers loads: config.json and safetensors."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any
import uuid

import jax
import numpy as np
import safetensors.numpy

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.models import transformer
from ftdefense.models.huggingface import architectures
from ftdefense.models.huggingface import layout

SHARD_BYTES = 5 * 10**9
# What `save` copies from a source folder, where it is there.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save(
    folder: str | os.PathLike,
    model: transformer.LanguageModel,
    params: types.Params,
    *,
    source: str | os.PathLike | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads, in float32; whole or not at all.

    Args:
      folder: what to write.
      model: gives the config.json; that of `source` is kept, where it says the same.
      params: of the model.
      source: folder whose tokenizer, chat template and generation files are copied.
      tokenizer: one of transformers', saved beside the weights; wins over `source`.
      max_shard_bytes: larger models are split over several files, with an index.
      overwrite: replaces a folder that is not empty.

    Raises:
      UserError: if the folder is not empty, the parameters are not those of the model,
        or no architecture of transformers can hold them.
    """
    folder = pathlib.Path(folder)
    if (
        folder.exists()
        and not overwrite
        and (folder.is_file() or any(folder.iterdir()))
    ):
        raise errors.UserError(
            f"{folder} exists and is not empty; export to another folder, or ask to "
            "overwrite it."
        )
    _check_params(model, params)
    fields = _config_fields(model.config, source)
    partial = _sibling(folder, "partial")
    partial.mkdir(parents=True)
    try:
        if source is not None:
            _copy_companions(pathlib.Path(source), partial)
        if tokenizer is not None:
            fields |= _special_tokens(tokenizer)
            tokenizer.save_pretrained(partial)
        _write_weights(partial, model, params, max_shard_bytes)
        _write_json(partial / layout.CONFIG, fields)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_params(model: transformer.LanguageModel, params: types.Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    given = {tree.path_names(path): leaf.shape for path, leaf in leaves}
    wanted = layout.shapes(model)
    for path in sorted({*given, *wanted}):
        if given.get(path) != wanted.get(path):
            raise errors.UserError(
                f"export: parameter {'/'.join(path)} is {given.get(path, 'missing')}, "
                f"but the model's is {wanted.get(path, 'not there')}; merge adapters, "
                "and export with the model that was trained."
            )


def _config_fields(
    config: transformer.ModelConfig, source: str | os.PathLike | None
) -> dict[str, Any]:
    """Of the source, if it is the same model: it knows more, as its end tokens."""
    if source is not None and (pathlib.Path(source) / layout.CONFIG).is_file():
        fields = layout.read_json(pathlib.Path(source) / layout.CONFIG)
        with contextlib.suppress(errors.UserError):
            theirs = architectures.parse(fields, str(source))
            # How we run it is not part of the file.
            ours = dataclasses.replace(
                config,
                compute_dtype=theirs.compute_dtype,
                remat=theirs.remat,
                unroll=theirs.unroll,
                init_scale=theirs.init_scale,
                residual_init=theirs.residual_init,
            )
            if ours == theirs:
                fields.pop("torch_dtype", None)
                return {**fields, "dtype": "float32"}
    return architectures.render(config)


def _copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
    if not source.is_dir():
        raise errors.UserError(
            f"export: source folder {source} not found; give the folder that the "
            "model was loaded from."
        )
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name, None) for name in names}
    return {name: value for name, value in ids.items() if value is not None}


def _write_weights(
    folder: pathlib.Path,
    model: transformer.LanguageModel,
    params: types.Params,
    max_bytes: int,
) -> None:
    """One shard in memory at a time."""
    shards: list[list[layout.Tensor]] = [[]]
    filled = total = 0
    for tensor in layout.tensors(model):
        size = 4 * int(np.prod(tensor.shape))
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = layout.WEIGHTS
        values = {tensor.name: _value(params, tensor) for tensor in shard}
        safetensors.numpy.save_file(values, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / layout.INDEX, index)


def _value(params: types.Params, tensor: layout.Tensor) -> np.ndarray:
    leaf = params
    for name in tensor.path:
        leaf = leaf[name]
    value = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer], np.float32)
    return np.ascontiguousarray(value.T if tensor.transposed else value)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _replace(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames `partial` to `folder`; what was there goes only once the new one is."""
    old = _sibling(folder, "old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _sibling(folder: pathlib.Path, what: str) -> pathlib.Path:
    """A hidden name beside `folder` that nobody else uses: on the same disk."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.{what}.{uuid.uuid4().hex[:8]}")
