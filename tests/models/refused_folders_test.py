"""Folders of transformers that are refused, each in one line that says why."""

import json
import shutil

import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.models import huggingface
from tests.models import folders


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "architecture none"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lack 'factor'"),
        ({"rope_parameters": {"full_attention": {}}}, "one per layer type"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 1,
            },
            "in some layers only",
        ),
    ],
)
def test_unsupported_configs_are_named(fields, message, folder):
    """Catches a feature that is ignored: the logits would be silently wrong."""
    folders.edit_json(folder / "config.json", **fields)
    with pytest.raises(errors.UserError, match=message) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder):
    path = folder / huggingface.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def drop_tensor(folder):
    folders.edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def add_tensor(folder):
    folders.edit_weights(folder, lambda t: t.update(adapter=np.zeros(2, np.float32)))


def add_layer(folder):
    name = "model.layers.2.input_layernorm.weight"
    folders.edit_weights(folder, lambda t: t.update({name: np.zeros(8, np.float32)}))


def misshape(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    folders.edit_weights(
        folder, lambda t: t.update({name: np.zeros((12, 8), np.float32)})
    )


def mistype(folder):
    name = "model.norm.weight"
    folders.edit_weights(folder, lambda t: t.update({name: np.zeros(8, np.int8)}))


def spoil(folder):
    name = "model.norm.weight"
    folders.edit_weights(
        folder, lambda t: t.update({name: np.full(8, np.nan, np.float32)})
    )


def only_bin(folder):
    (folder / huggingface.WEIGHTS).rename(folder / "pytorch_model.bin")


def untie(folder):
    folders.edit_json(folder / "config.json", tie_word_embeddings=True)


LFS = "version https://git-lfs.github.com/spec/v1\n"
BROKEN = {
    "no_folder": (shutil.rmtree, "config.json not found.*save_pretrained"),
    "no_config": (remove("config.json"), "config.json not found.*save_pretrained"),
    "config_not_json": (write("config.json", "{"), "config.json cannot be read"),
    "config_a_list": (write("config.json", "[]"), "JSON list, not an object"),
    "no_weights": (remove("model.safetensors"), "expected model.safetensors or"),
    "only_bin": (only_bin, "found only pytorch_model.bin.*save_pretrained"),
    "truncated": (truncate, "model.safetensors is not a whole.*download it again"),
    "lfs_pointer": (write("model.safetensors", LFS), "git lfs pull"),
    "missing": (
        drop_tensor,
        r"model.layers.1.mlp.up_proj.weight \(1 in all\) is missing from "
        "model.safetensors",
    ),
    "extra": (add_tensor, r"model.safetensors: tensor adapter \(1 in all\) is not"),
    "layer_more": (add_layer, "model.layers.2.input_layernorm.weight"),
    "misshapen": (
        misshape,
        r"model.safetensors: tensor model.layers.0.mlp.down_proj.weight is \[12, 8\], "
        r"but config.json asks for \[8, 12\]",
    ),
    "spoiled": (spoil, "model.safetensors: tensor model.norm.weight holds numbers"),
    "mistyped": (mistype, "model.safetensors: tensor model.norm.weight is I8"),
    "untied": (untie, "lm_head.weight differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named_in_one_line(name, folder):
    """Catches any check of a folder that is dropped, or forgets what it looked at."""
    break_it, message = BROKEN[name]
    break_it(folder)
    with pytest.raises(errors.UserError, match=message) as caught:
        huggingface.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def drop_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def misplace(folder):
    index = json.loads((folder / huggingface.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in shards if shard != index["weight_map"]["model.norm.weight"]
    )
    (folder / huggingface.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (drop_shard, "model-00002-of-.*not found.*download the missing shard"),
        (misplace, "lacks tensor model.norm.weight, which"),
        (write(huggingface.INDEX, "{}"), "no weight_map"),
    ],
)
def test_broken_shards_are_named(break_it, message, tmp_path):
    """Catches a shard that is skipped when it is not there."""
    folders.save(tmp_path / "model", max_shard_bytes=1000)
    break_it(tmp_path / "model")
    with pytest.raises(errors.UserError, match=message):
        huggingface.load(tmp_path / "model")
