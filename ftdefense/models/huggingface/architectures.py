"""config.json of transformers <-> ModelConfig, for the architectures that we share."""

from collections.abc import Mapping
from typing import Any

from ftdefense.core import errors
from ftdefense.models import configuration
from ftdefense.models import rope

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Our field, theirs, and its type; a folder without one of them is refused.
_SHAPES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
# Fields that would change the computation, and the values that do not.
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
# transformers' own default for configs that leave a field out.
_HEAD_DIM = {"qwen3": 128}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_MAX_LENGTH = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}


def parse(fields: Mapping[str, Any], where: str) -> configuration.ModelConfig:
    """The model that `fields` of a config.json describe.

    Args:
      fields: the parsed JSON; rotary settings as transformers 5 (`rope_parameters`) or
        as older releases (`rope_theta`, `rope_scaling`) write them.
      where: path of the file, for messages.

    Raises:
      UserError: for an unsupported architecture or feature, or a missing field.
    """
    name = (fields.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise errors.UserError(
            f"{where}: architecture {name} is not supported; use a model of "
            f"{', '.join(ARCHITECTURES)}."
        )
    kind = ARCHITECTURES[name]
    for field, neutral in _NEUTRAL.items():
        if fields.get(field, neutral[0]) not in neutral:
            raise errors.UserError(
                f"{where}: {field}={fields[field]!r} is not supported (only "
                f"{neutral[0]!r}); use a checkpoint without it."
            )
    shape = {ours: _integer(fields, theirs, where) for ours, theirs in _SHAPES.items()}
    theta, scaling = _rope(fields, where)
    biased = bool(fields.get("attention_bias", False))
    heads = shape["heads"]
    return configuration.ModelConfig(
        **shape,
        kv_heads=_default(fields, "num_key_value_heads", _KV_HEADS.get(kind, heads))
        or heads,
        head_dim=_default(fields, "head_dim", _HEAD_DIM.get(kind, 0)) or 0,
        max_length=fields.get("max_position_embeddings", _MAX_LENGTH[kind]),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=float(fields.get("rms_norm_eps", 1e-6)),
        tied=bool(fields.get("tie_word_embeddings", False)),
        # Qwen2 has biases always, Mistral never; Llama and Qwen3 also on the output.
        attention_bias=kind == "qwen2" or (biased and kind != "mistral"),
        output_bias=biased and kind in ("llama", "qwen3"),
        qk_norm=kind == "qwen3",
        sliding_window=_window(fields, kind, shape["layers"], where),
        init_scale=float(fields.get("initializer_range", 0.02)),
    )


def _default(fields: Mapping[str, Any], name: str, value: int) -> int | None:
    return fields[name] if name in fields else value


def _integer(fields: Mapping[str, Any], name: str, where: str) -> int:
    if type(fields.get(name)) is not int or fields[name] < 1:
        raise errors.UserError(
            f"{where}: {name} is {fields.get(name)!r}, not a positive whole number; "
            "write the folder again with transformers' save_pretrained."
        )
    return fields[name]


def _rope(
    fields: Mapping[str, Any], where: str
) -> tuple[float, rope.RopeScaling | None]:
    """Base and scaling of the rotary positions."""
    parameters = fields.get("rope_parameters") or {}
    scaling = parameters or fields.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", fields.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    per_layer = any(isinstance(value, Mapping) for value in parameters.values())
    if per_layer or kind not in ("default", "linear", "llama3"):
        raise errors.UserError(
            f"{where}: rotary positions of type "
            f"{'one per layer type' if per_layer else repr(kind)} are not supported "
            "(only default, linear, llama3); use a checkpoint without them."
        )
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise errors.UserError(
            f"{where}: partial_rotary_factor={parameters['partial_rotary_factor']} is "
            "not supported (only 1); use a checkpoint without it."
        )
    try:
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
    except KeyError as error:
        raise errors.UserError(
            f"{where}: {kind} rotary positions lack {error}; take config.json anew "
            "from where the model is published."
        ) from error
    return float(theta), None


def _window(
    fields: Mapping[str, Any], kind: str, layers: int, where: str
) -> int | None:
    """Width of sliding-window attention, the same in all layers, or None."""
    width = fields.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or width is None:
        return None
    if kind == "mistral":
        return width
    if not fields.get("use_sliding_window", False):
        return None
    first = fields.get("max_window_layers", 28)
    per_layer = fields.get("layer_types")
    if per_layer:
        sliding = {layer_type == "sliding_attention" for layer_type in per_layer}
    else:
        sliding = {layer >= first for layer in range(layers)}
    if len(sliding) > 1:
        raise errors.UserError(
            f"{where}: a sliding window in some layers only is not supported; set "
            "use_sliding_window to false, if sequences are shorter than the window "
            f"of {width}."
        )
    return width if sliding == {True} else None


def render(config: configuration.ModelConfig) -> dict[str, Any]:
    """Fields of a config.json; the architecture is the plainest that can hold it.

    Raises:
      UserError: for a combination that none of the architectures has.
    """
    name = _architecture(config)
    kind = ARCHITECTURES[name]
    fields: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "initializer_range": config.init_scale or 0.02,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = config.attention_bias
    if kind == "mistral":
        fields["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3") and config.sliding_window is not None:
        fields |= {
            "use_sliding_window": True,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0,
        }
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {
            "rope_type": config.rope_scaling.kind,
            "factor": config.rope_scaling.factor,
        }
    if scaling["rope_type"] == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_length,
        }
    # Both spellings: transformers 5 reads the last, older releases the first two.
    fields["rope_theta"] = config.rope_theta
    fields["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    fields["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    return fields


def _architecture(config: configuration.ModelConfig) -> str:
    biases = (config.attention_bias, config.output_bias)
    if config.qk_norm and biases in ((False, False), (True, True)):
        return "Qwen3ForCausalLM"
    if not config.qk_norm and biases == (True, False):
        return "Qwen2ForCausalLM"
    if not config.qk_norm and biases == (False, False) and config.sliding_window:
        return "MistralForCausalLM"
    windowed = config.sliding_window is not None
    if not config.qk_norm and biases in ((False, False), (True, True)) and not windowed:
        return "LlamaForCausalLM"
    raise errors.UserError(
        f"export: no architecture of {', '.join(ARCHITECTURES)} has qk_norm="
        f"{config.qk_norm}, attention_bias={config.attention_bias}, output_bias="
        f"{config.output_bias} and sliding_window={config.sliding_window} at once; "
        "change one of these fields of the model."
    )
