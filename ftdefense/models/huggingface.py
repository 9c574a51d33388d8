"""Reads and writes Hugging Face folders: config.json and safetensors."""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.models import rope
from ftdefense.models import transformer

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# What `save` copies from a source folder besides weights and config.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Ours below layers/, theirs below model.layers.N, and whether a kernel is transposed.
_LAYER_TENSORS = {
    ("attention_norm", "scale"): ("input_layernorm.weight", False),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", False),
    ("attention", "q_norm", "scale"): ("self_attn.q_norm.weight", False),
    ("attention", "k_norm", "scale"): ("self_attn.k_norm.weight", False),
    **{
        ("attention", name, "kernel"): (f"self_attn.{name}_proj.weight", True)
        for name in "qkvo"
    },
    **{
        ("attention", name, "bias"): (f"self_attn.{name}_proj.bias", False)
        for name in "qkvo"
    },
    **{
        ("mlp", name, "kernel"): (f"mlp.{name}_proj.weight", True)
        for name in ("gate", "up", "down")
    },
}
_TOP_TENSORS = {
    ("embed", "embedding"): ("model.embed_tokens.weight", False),
    ("final_norm", "scale"): ("model.norm.weight", False),
    ("lm_head", "kernel"): ("lm_head.weight", True),
}


def read_config(folder: str | pathlib.Path) -> transformer.ModelConfig:
    """The shape of the model in a folder.

    Raises:
      UserError: for a missing or unreadable config.json, an unsupported architecture
        or an unsupported feature of it.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise errors.UserError(
            f"{folder} holds no config.json; --model takes a folder as transformers' "
            "save_pretrained writes it."
        )
    try:
        read = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise errors.UserError(f"{path} is not JSON (line {error.lineno}).") from error
    names = read.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise errors.UserError(
            f"{path}: architecture {names[0]} is not supported; "
            f"known: {', '.join(ARCHITECTURES)}."
        )
    if read.get("hidden_act", "silu") != "silu":
        raise errors.UserError(f"{path}: hidden_act {read['hidden_act']} is not silu.")
    if read.get("mlp_bias"):
        raise errors.UserError(f"{path}: mlp_bias is not supported.")
    theta, scaling = _rope(read, path)
    qwen2 = names[0] == "Qwen2ForCausalLM"
    windowed = read.get("use_sliding_window", names[0] == "MistralForCausalLM")
    try:
        return transformer.ModelConfig(
            vocab_size=read["vocab_size"],
            width=read["hidden_size"],
            layers=read["num_hidden_layers"],
            heads=read["num_attention_heads"],
            kv_heads=read.get("num_key_value_heads") or read["num_attention_heads"],
            mlp_width=read["intermediate_size"],
            head_dim=read.get("head_dim") or 0,
            max_length=read.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=read.get("rms_norm_eps", 1e-6),
            tied=read.get("tie_word_embeddings", False),
            attention_bias=qwen2 or read.get("attention_bias", False),
            output_bias=not qwen2 and read.get("attention_bias", False),
            qk_norm=names[0] == "Qwen3ForCausalLM",
            sliding_window=read.get("sliding_window") if windowed else None,
        )
    except KeyError as error:
        raise errors.UserError(f"{path} lacks the field {error}.") from error


def _rope(
    read: Mapping[str, Any], path: pathlib.Path
) -> tuple[float, rope.RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older fields."""
    parameters = read.get("rope_parameters") or {}
    scaling = read.get("rope_scaling") or parameters
    theta = parameters.get("rope_theta", read.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), rope.RopeScaling("linear", float(scaling["factor"]))
    if kind == "llama3":
        return float(theta), rope.RopeScaling(
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise errors.UserError(
        f"{path}: rope type {kind!r} is not supported; known: default, linear, llama3."
    )


def load(
    folder: str | pathlib.Path, **overrides: Any
) -> tuple[transformer.LanguageModel, types.Params]:
    """Model and float32 parameters of a folder; tensors are read one at a time.

    Args:
      overrides: fields of `ModelConfig`, as compute_dtype="bfloat16".

    Raises:
      UserError: for missing, extra or misshapen tensors, or an unreadable file.
    """
    folder = pathlib.Path(folder)
    config = dataclasses.replace(read_config(folder), **overrides)
    model = transformer.LanguageModel(config)
    wanted = dict(_names(config))
    files = _files(folder)
    missing = sorted(set(_tensor_names(wanted.values())) - set(files))
    # A tied head is sometimes stored all the same.
    known = {*_tensor_names(wanted.values()), "lm_head.weight"}
    extra = sorted(
        name for name in set(files) - known if not name.endswith("rotary_emb.inv_freq")
    )
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has the unknown {extra[0]}"
        raise errors.UserError(
            f"{folder} {what} ({len(missing)} tensors missing, {len(extra)} unknown): "
            "its weights do not belong to its config.json."
        )
    shapes = _shapes(config)
    params: dict[str, Any] = {}
    for path, (names, transposed) in wanted.items():
        parts = [_read(files[name], name, transposed) for name in names]
        for name, part in zip(names, parts, strict=True):
            expected = shapes[path][1:] if path[0] == "layers" else shapes[path]
            if part.shape != expected:
                shown = part.shape[::-1] if transposed else part.shape
                wants = expected[::-1] if transposed else expected
                raise errors.UserError(
                    f"{folder}: tensor {name} has shape {list(shown)}, but "
                    f"config.json asks for {list(wants)}."
                )
        value = np.stack(parts) if path[0] == "layers" else parts[0]
        _set(params, path, value)
    return model, params


def save(
    folder: str | pathlib.Path,
    model: transformer.LanguageModel,
    params: types.Params,
    *,
    source: str | pathlib.Path | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers loads; it appears whole or not at all.

    Args:
      source: folder whose tokenizer, template and generation files are copied.
      tokenizer: saved instead, where there is no source.
      max_shard_bytes: tensors are split over files of at most this size.

    Raises:
      UserError: if `folder` exists and is not empty.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise errors.UserError(
            f"{folder} exists and is not empty; export to another folder."
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if source is not None:
        for name in _COMPANIONS:
            if (pathlib.Path(source) / name).is_file():
                shutil.copyfile(pathlib.Path(source) / name, partial / name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(partial)
    written = json.dumps(to_config(model.config), indent=2) + "\n"
    (partial / "config.json").write_text(written)
    _write_shards(partial, _flatten(model.config, params), max_shard_bytes)
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)


def to_config(config: transformer.ModelConfig) -> dict[str, Any]:
    """config.json of a model; the architecture is the plainest that can hold it."""
    if config.qk_norm:
        name, kind = "Qwen3ForCausalLM", "qwen3"
    elif config.attention_bias and not config.output_bias:
        name, kind = "Qwen2ForCausalLM", "qwen2"
    elif config.sliding_window is not None:
        name, kind = "MistralForCausalLM", "mistral"
    else:
        name, kind = "LlamaForCausalLM", "llama"
    rope_parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
    }
    scaling = config.rope_scaling
    if scaling is not None:
        rope_parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope_parameters |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    written = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope_parameters,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    if scaling is not None:
        written["rope_scaling"] = {
            k: v for k, v in rope_parameters.items() if k != "rope_theta"
        }
    if kind == "mistral":
        written["sliding_window"] = config.sliding_window
    if kind == "llama":
        written["mlp_bias"] = False
    return written


def _names(config: transformer.ModelConfig):
    """(our path, (their tensor names, transposed)) for every parameter."""
    shapes = _shapes(config)
    for path, (name, transposed) in _TOP_TENSORS.items():
        if path in shapes:
            yield path, ([name], transposed)
    for path, (name, transposed) in _LAYER_TENSORS.items():
        if ("layers", *path) in shapes:
            names = [f"model.layers.{i}.{name}" for i in range(config.layers)]
            yield ("layers", *path), (names, transposed)


def _tensor_names(values: Iterable[tuple[list[str], bool]]) -> list[str]:
    return [name for names, _ in values for name in names]


def _shapes(config: transformer.ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of our parameters by path."""
    n, d, f, k = config.layers, config.width, config.mlp_width, config.head_width
    q, kv = config.heads * k, config.kv_heads * k
    kernels = {
        ("attention", "q"): (d, q),
        ("attention", "k"): (d, kv),
        ("attention", "v"): (d, kv),
        ("attention", "o"): (q, d),
        ("mlp", "gate"): (d, f),
        ("mlp", "up"): (d, f),
        ("mlp", "down"): (f, d),
    }
    shapes = {
        ("embed", "embedding"): (config.vocab_size, d),
        ("final_norm", "scale"): (d,),
        ("layers", "attention_norm", "scale"): (n, d),
        ("layers", "mlp_norm", "scale"): (n, d),
    }
    for path, shape in kernels.items():
        shapes["layers", *path, "kernel"] = (n, *shape)
        biased = config.output_bias if path[1] == "o" else config.attention_bias
        if path[0] == "attention" and biased:
            shapes["layers", *path, "bias"] = (n, shape[1])
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            shapes["layers", "attention", name, "scale"] = (n, k)
    if not config.tied:
        shapes["lm_head", "kernel"] = (d, config.vocab_size)
    return shapes


def _files(folder: pathlib.Path) -> dict[str, Any]:
    """Open safetensors files by the tensor names that they hold."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / shard for shard in shards]
    elif single.is_file():
        paths = [single]
    else:
        raise errors.UserError(
            f"{folder} holds no model.safetensors (nor an index of shards); convert "
            "other formats with transformers' save_pretrained(safe_serialization)."
        )
    found: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise errors.UserError(f"{index} names {path.name}, which is not there.")
        try:
            opened = safetensors.safe_open(path, framework="flax")
        except (safetensors.SafetensorError, OSError) as error:
            raise errors.UserError(
                f"{path} cannot be read: {error}; is the file truncated?"
            ) from error
        found |= dict.fromkeys(opened.keys(), opened)
    return found


def _read(opened: Any, name: str, transposed: bool) -> np.ndarray:
    """One tensor in float32, in our orientation [in, out]."""
    value = np.asarray(opened.get_tensor(name)).astype(np.float32)
    return value.T if transposed else value


def _flatten(config: transformer.ModelConfig, params: types.Params) -> dict[str, Any]:
    """Their tensor names -> float32 arrays in their orientation."""
    flat: dict[str, Any] = {}
    for path, (names, transposed) in _names(config):
        value: Any = params
        for part in path:
            value = value[part]
        value = np.asarray(value, np.float32)
        parts = value if path[0] == "layers" else [value]
        for name, part in zip(names, parts, strict=True):
            flat[name] = np.ascontiguousarray(part.T if transposed else part)
    return flat


def _write_shards(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], max_bytes: int
) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, value in tensors.items():
        if shards[-1] and filled + value.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += value.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        path = folder / "model.safetensors"
        safetensors.numpy.save_file(shards[0], path, metadata=metadata)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(shard, folder / name, metadata=metadata)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _set(nested: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        nested = nested.setdefault(name, {})
    nested[path[-1]] = value
