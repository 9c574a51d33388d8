"""Reads and writes the folders of transformers: config.json and safetensors."""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from typing import Any
from typing import NamedTuple
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.models import huggingface_config
from ftdefense.models import transformer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
_DTYPES = ("F32", "F16", "BF16")
# Of both: the module's name here -> there, below layers/ and model.layers.N.
_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Tensor(NamedTuple):
    """One tensor of a checkpoint and where it belongs.

    Attributes:
      name: in the checkpoint.
      path: of our parameter.
      layer: index into its leading axis; None: it has none.
      transposed: whether theirs is [out, in] where ours is [in, out].
      shape: theirs.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def _shapes(model: transformer.LanguageModel) -> dict[tuple[str, ...], tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(model.init, jax.random.key(0))
    )
    return {tree.path_names(path): leaf.shape for path, leaf in leaves}


def tensors(model: transformer.LanguageModel) -> Iterator[Tensor]:
    """Every tensor of the model's checkpoint, those of one parameter in a row."""
    for path, shape in _shapes(model).items():
        stacked = path[0] == "layers"
        module = _MODULES["/".join(path[stacked:-1])]
        suffix = "bias" if path[-1] == "bias" else "weight"
        transposed = path[-1] == "kernel"
        inner = shape[1:] if stacked else shape
        theirs = inner[::-1] if transposed else inner
        if not stacked:
            yield Tensor(f"{module}.{suffix}", path, None, transposed, theirs)
            continue
        for layer in range(shape[0]):
            name = f"model.layers.{layer}.{module}.{suffix}"
            yield Tensor(name, path, layer, transposed, theirs)


def read_config(folder: str | os.PathLike) -> transformer.ModelConfig:
    """The model that a folder holds.

    Raises:
      UserError: if config.json is missing, unreadable or of an unsupported model.
    """
    path = pathlib.Path(folder) / CONFIG
    return huggingface_config.parse(_read_json(path), str(path))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise errors.UserError(
            f"{path} not found; give a folder that transformers' save_pretrained wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise errors.UserError(
            f"{path} cannot be read as JSON ({error}); download the file again."
        ) from error
    if not isinstance(read, dict):
        raise errors.UserError(
            f"{path} holds a JSON {type(read).__name__}, not an object; download the "
            "file again."
        )
    return read


def load(
    folder: str | os.PathLike, **overrides: Any
) -> tuple[transformer.LanguageModel, types.Params]:
    """A folder's model and its parameters in float32.

    Files are memory-mapped and read tensor by tensor: beside the parameters, no more
    than one stacked parameter is held.

    Args:
      folder: with config.json and model.safetensors, or shards with their index;
        tensors are float32, bfloat16 or float16.
      **overrides: fields of `ModelConfig`, as compute_dtype="bfloat16".

    Raises:
      UserError: for an unsupported config, for missing, extra, misshapen or mistyped
        tensors, and for files that cannot be read; names folder, file and tensor.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    known = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            raise errors.unknown("field of ModelConfig", name, known)
    model = transformer.LanguageModel(dataclasses.replace(config, **overrides))
    wanted = list(tensors(model))
    with contextlib.ExitStack() as stack:
        found = _open(folder, stack)
        _check_names(folder, found, wanted, config.tied)
        for tensor in wanted:
            _check_tensor(found[tensor.name], tensor)
        if config.tied and HEAD in found:
            _check_tied(found)
        return model, _read_params(found, wanted, _shapes(model))


class Opened(NamedTuple):
    """An open safetensors file and where it is."""

    path: pathlib.Path
    file: Any


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Opened]:
    """The open file of each tensor that the folder holds."""
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise errors.UserError(
                f"{folder / INDEX} has no weight_map; download the file again."
            )
        names = sorted(set(index.values()))
    elif (folder / WEIGHTS).is_file():
        names, index = [WEIGHTS], None
    else:
        others = sorted(p.name for p in folder.glob("*.bin"))
        held = f"only {others[0]}" if others else "neither"
        raise errors.UserError(
            f"{folder}: expected {WEIGHTS} or {INDEX}, found {held}; write the folder "
            "with transformers' save_pretrained."
        )
    found: dict[str, Opened] = {}
    for name in names:
        opened = _open_file(folder / name, stack)
        found |= dict.fromkeys(opened.file.keys(), opened)
    for tensor, name in (index or {}).items():
        if tensor not in found or found[tensor].path.name != name:
            raise errors.UserError(
                f"{folder / name} lacks tensor {tensor}, which {INDEX} says it holds; "
                "download both files again."
            )
    return found


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> Opened:
    if not path.is_file():
        raise errors.UserError(
            f"{path} not found, though {INDEX} names it; download the missing shard."
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
    folder: pathlib.Path, found: dict[str, Opened], wanted: list[Tensor], tied: bool
) -> None:
    names = {tensor.name for tensor in wanted}
    missing = [tensor.name for tensor in wanted if tensor.name not in found]
    if missing:
        files = sorted({opened.path.name for opened in found.values()})
        raise errors.UserError(
            f"{folder}: tensor {missing[0]} ({len(missing)} in all) is missing from "
            f"{', '.join(files) or 'its empty files'}; {CONFIG} belongs to another "
            "checkpoint or the download is incomplete: download the folder again."
        )
    extra = sorted(
        name
        for name in set(found) - names
        # Old checkpoints store the frequencies, and some a tied head.
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == HEAD)
    )
    if extra:
        raise errors.UserError(
            f"{found[extra[0]].path}: tensor {extra[0]} ({len(extra)} in all) is not "
            f"part of the model in {CONFIG}; use the {CONFIG} that was published with "
            "these weights."
        )


def _check_tensor(opened: Opened, tensor: Tensor) -> None:
    view = opened.file.get_slice(tensor.name)
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if shape != tensor.shape:
        raise errors.UserError(
            f"{opened.path}: tensor {tensor.name} is {list(shape)}, but {CONFIG} asks "
            f"for {list(tensor.shape)}; use the {CONFIG} that was published with these "
            "weights."
        )
    if dtype not in _DTYPES:
        raise errors.UserError(
            f"{opened.path}: tensor {tensor.name} is {dtype}, not one of "
            f"{', '.join(_DTYPES)}; use an unquantised checkpoint."
        )


def _check_tied(found: dict[str, Opened]) -> None:
    head, embedding = (found[name].file.get_tensor(name) for name in (HEAD, EMBEDDING))
    if not np.array_equal(head, embedding):
        raise errors.UserError(
            f"{found[HEAD].path}: tensor {HEAD} differs from {EMBEDDING}, though "
            f"{CONFIG} ties them; set tie_word_embeddings to false there."
        )


def _read_params(
    found: dict[str, Opened],
    wanted: list[Tensor],
    shapes: dict[tuple[str, ...], tuple[int, ...]],
) -> types.Params:
    params: dict[str, Any] = {}
    for path, parts in itertools.groupby(wanted, key=lambda tensor: tensor.path):
        whole = np.empty(shapes[path], np.float32)
        for tensor in parts:
            value = found[tensor.name].file.get_tensor(tensor.name)
            target = whole if tensor.layer is None else whole[tensor.layer]
            target[...] = value.T if tensor.transposed else value
        *parents, name = path
        nested = params
        for parent in parents:
            nested = nested.setdefault(parent, {})
        nested[name] = jnp.asarray(whole)
    return params


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
            f"{folder} exists and is not empty; export to another folder, or pass "
            "overwrite=True to replace it."
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
        _write_json(partial / CONFIG, fields)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_params(model: transformer.LanguageModel, params: types.Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    given = {tree.path_names(path): leaf.shape for path, leaf in leaves}
    wanted = _shapes(model)
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
    if source is not None and (pathlib.Path(source) / CONFIG).is_file():
        fields = _read_json(pathlib.Path(source) / CONFIG)
        with contextlib.suppress(errors.UserError):
            theirs = huggingface_config.parse(fields, str(source))
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
    return huggingface_config.render(config)


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
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors(model):
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
            name = WEIGHTS
        values = {tensor.name: _value(params, tensor) for tensor in shard}
        safetensors.numpy.save_file(values, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def _value(params: types.Params, tensor: Tensor) -> np.ndarray:
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
