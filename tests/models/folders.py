"""Folders of a tiny model for each architecture, and edits of what is in them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import safetensors.numpy

from ftdefense.models import huggingface
from ftdefense.models import rope
from ftdefense.models import transformer

CONFIG = transformer.ModelConfig(
    vocab_size=13,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp_width=12,
    max_length=32,
    init_scale=0.02,
)
LLAMA3 = rope.RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
CONFIGS = {
    "llama": CONFIG,
    "llama_biased": dataclasses.replace(
        CONFIG, attention_bias=True, output_bias=True, rope_scaling=LLAMA3
    ),
    "linear": dataclasses.replace(CONFIG, rope_scaling=rope.RopeScaling("linear", 2.0)),
    "mistral": dataclasses.replace(CONFIG, sliding_window=5),
    "qwen2": dataclasses.replace(CONFIG, attention_bias=True, tied=True),
    "qwen2_windowed": dataclasses.replace(
        CONFIG, attention_bias=True, sliding_window=5
    ),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True, head_dim=6),
}


@functools.cache
def params(config=CONFIG):
    model = transformer.LanguageModel(config)
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        model.init(jax.random.key(0)),
    )


def save(folder, config=CONFIG, **arguments):
    model = transformer.LanguageModel(config)
    huggingface.save(folder, model, params(config), **arguments)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / huggingface.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
