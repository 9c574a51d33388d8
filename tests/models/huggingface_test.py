"""Folders of transformers: what is read, what is written, what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from ftdefense.core import errors
from ftdefense.models import huggingface
from ftdefense.models import rope
from ftdefense.models import transformer
from ftdefense.models.huggingface import architectures

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


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / huggingface.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_equal(name, tmp_path):
    """Catches a kernel that is not transposed, and a field lost from config.json."""
    save(tmp_path / "model", CONFIGS[name])
    model, read = huggingface.load(tmp_path / "model")
    assert model.config == CONFIGS[name]
    assert_same(read, params(CONFIGS[name]))
    assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype("float32")}


def test_shards_with_an_index_read_the_same(tmp_path):
    """Catches a shard limit that is not kept, and tensors missing from the index."""
    save(tmp_path / "model", max_shard_bytes=1000)
    index = json.loads((tmp_path / "model" / huggingface.INDEX).read_text())
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = safetensors.numpy.load_file(tmp_path / "model" / shard)
        assert sum(x.nbytes for x in tensors.values()) <= 1000 or len(tensors) == 1
    size = 4 * sum(x.size for x in jax.tree.leaves(params()))
    assert index["metadata"]["total_size"] == size
    assert_same(huggingface.load(tmp_path / "model")[1], params())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_into_float32(dtype, folder):
    """Catches bfloat16 bytes read as float16, and narrow parameters."""

    def narrow(tensors):
        tensors.update({name: x.astype(dtype) for name, x in tensors.items()})

    safetensors_flax = pytest.importorskip("safetensors.flax")
    path = folder / huggingface.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    narrow(tensors)
    safetensors_flax.save_file(
        {name: jax.numpy.asarray(x) for name, x in tensors.items()}, path
    )
    _, read = huggingface.load(folder)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params())
    assert_same(read, rounded)


def test_both_spellings_of_rotary_settings_are_read(folder):
    """Catches a reader of one generation of transformers only."""
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_theta"], fields["rope_scaling"], fields["rope_parameters"]
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    for spelling in (new, old, older):
        config = architectures.parse({**fields, **spelling}, "x")
        assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)
    config = architectures.parse({**fields, "rope_theta": 77.0}, "x")
    assert (config.rope_theta, config.rope_scaling) == (77.0, None)


def test_overrides_are_fields_of_the_config(folder):
    """Catches overrides that are dropped, and misspelt ones that pass."""
    model, _ = huggingface.load(folder, compute_dtype="bfloat16", remat=True)
    assert (model.config.compute_dtype, model.config.remat) == ("bfloat16", True)
    with pytest.raises(errors.UserError, match="did you mean 'compute_dtype'"):
        huggingface.load(folder, compute_dtyp="bfloat16")


def test_companions_of_the_source_are_copied_and_its_config_kept(folder, tmp_path):
    """Catches an export without tokenizer, template or end tokens."""
    edit_json(folder / "config.json", eos_token_id=7, torch_dtype="bfloat16")
    written = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    for name in written:
        (folder / name).write_text(f"{{}} {name}")
    (folder / "secret.bin").write_text("not ours")
    save(tmp_path / "export", source=folder)
    for name in written:
        assert (tmp_path / "export" / name).read_text() == f"{{}} {name}"
    assert not (tmp_path / "export" / "secret.bin").exists()
    fields = json.loads((tmp_path / "export" / "config.json").read_text())
    assert fields["eos_token_id"] == 7 and fields["dtype"] == "float32"
    assert "torch_dtype" not in fields


def test_the_config_of_another_model_is_not_kept(folder, tmp_path):
    """Catches an export whose config.json is the source's, whatever was trained."""
    save(tmp_path / "export", CONFIGS["qwen3"], source=folder)
    assert huggingface.read_config(tmp_path / "export") == CONFIGS["qwen3"]


def test_a_tokenizer_is_saved_and_its_special_tokens_told(tmp_path):
    """Catches an exported model that transformers generates with forever."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, "<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        eos_token="</s>",
        pad_token="<pad>",
    )
    save(tmp_path / "model", tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.eos_token_id == 1
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["pad_token_id"]) == (1, 0)


def test_a_full_folder_is_kept_unless_overwritten(folder):
    """Catches an export over somebody's model; and an overwrite that merges folders."""
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(errors.UserError, match="not empty.*overwrite"):
        save(folder)
    assert (folder / "notes.txt").exists()
    save(folder, CONFIGS["qwen3"], overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert huggingface.read_config(folder) == CONFIGS["qwen3"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Catches files that are written in place."""

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["layers"]["mlp"].pop("up"), r"layers/mlp/up/kernel is missing"),
        (lambda p: p.update(extra=np.zeros(2)), r"extra is \(2,\)"),
        (
            lambda p: p["final_norm"].update(scale=np.zeros(3)),
            r"final_norm/scale is \(3,\), but the model's is \(8,\)",
        ),
    ],
)
def test_parameters_of_another_model_are_not_exported(change, message, tmp_path):
    """Catches an export that is only found broken when it is loaded."""
    broken = jax.tree.map(lambda x: x, params())
    change(broken)
    with pytest.raises(errors.UserError, match=message):
        huggingface.save(tmp_path / "model", transformer.LanguageModel(CONFIG), broken)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_architecture_has_is_not_exported(tmp_path):
    """Catches a bias that is silently left out of the export."""
    odd = dataclasses.replace(CONFIG, qk_norm=True, attention_bias=True)
    with pytest.raises(errors.UserError, match="no architecture of"):
        save(tmp_path / "model", odd)


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
    edit_json(folder / "config.json", **fields)
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
    edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def add_tensor(folder):
    edit_weights(folder, lambda t: t.update(adapter=np.zeros(2, np.float32)))


def add_layer(folder):
    name = "model.layers.2.input_layernorm.weight"
    edit_weights(folder, lambda t: t.update({name: np.zeros(8, np.float32)}))


def misshape(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, lambda t: t.update({name: np.zeros((12, 8), np.float32)}))


def mistype(folder):
    name = "model.norm.weight"
    edit_weights(folder, lambda t: t.update({name: np.zeros(8, np.int8)}))


def spoil(folder):
    name = "model.norm.weight"
    edit_weights(folder, lambda t: t.update({name: np.full(8, np.nan, np.float32)}))


def only_bin(folder):
    (folder / huggingface.WEIGHTS).rename(folder / "pytorch_model.bin")


def untie(folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)


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
    save(tmp_path / "model", max_shard_bytes=1000)
    break_it(tmp_path / "model")
    with pytest.raises(errors.UserError, match=message):
        huggingface.load(tmp_path / "model")


def test_a_tied_head_that_is_stored_too_is_accepted(tmp_path):
    """Catches strictness about what old checkpoints do hold."""
    config = dataclasses.replace(CONFIG, tied=True)
    save(tmp_path / "model", config)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(
            2, np.float32
        )

    edit_weights(tmp_path / "model", change)
    assert_same(huggingface.load(tmp_path / "model")[1], params(config))
