"""Folders of transformers: what is read, what is written."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ftdefense.core import errors
from ftdefense.models import huggingface
from ftdefense.models import transformer
from ftdefense.models.huggingface import architectures
from tests.models import folders


@pytest.mark.parametrize("name", folders.CONFIGS)
def test_round_trip_is_bit_equal(name, tmp_path):
    """Catches a kernel that is not transposed, and a field lost from config.json."""
    folders.save(tmp_path / "model", folders.CONFIGS[name])
    model, read = huggingface.load(tmp_path / "model")
    assert model.config == folders.CONFIGS[name]
    folders.assert_same(read, folders.params(folders.CONFIGS[name]))
    assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype("float32")}


def test_shards_with_an_index_read_the_same(tmp_path):
    """Catches a shard limit that is not kept, and tensors missing from the index."""
    folders.save(tmp_path / "model", max_shard_bytes=1000)
    index = json.loads((tmp_path / "model" / huggingface.INDEX).read_text())
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = safetensors.numpy.load_file(tmp_path / "model" / shard)
        assert sum(x.nbytes for x in tensors.values()) <= 1000 or len(tensors) == 1
    size = 4 * sum(x.size for x in jax.tree.leaves(folders.params()))
    assert index["metadata"]["total_size"] == size
    folders.assert_same(huggingface.load(tmp_path / "model")[1], folders.params())


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
    rounded = jax.tree.map(
        lambda x: x.astype(dtype).astype("float32"), folders.params()
    )
    folders.assert_same(read, rounded)


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
        assert (config.rope_theta, config.rope_scaling) == (5e5, folders.LLAMA3)
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
    folders.edit_json(folder / "config.json", eos_token_id=7, torch_dtype="bfloat16")
    written = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    for name in written:
        (folder / name).write_text(f"{{}} {name}")
    (folder / "secret.bin").write_text("not ours")
    folders.save(tmp_path / "export", source=folder)
    for name in written:
        assert (tmp_path / "export" / name).read_text() == f"{{}} {name}"
    assert not (tmp_path / "export" / "secret.bin").exists()
    fields = json.loads((tmp_path / "export" / "config.json").read_text())
    assert fields["eos_token_id"] == 7 and fields["dtype"] == "float32"
    assert "torch_dtype" not in fields


def test_the_config_of_another_model_is_not_kept(folder, tmp_path):
    """Catches an export whose config.json is the source's, whatever was trained."""
    folders.save(tmp_path / "export", folders.CONFIGS["qwen3"], source=folder)
    assert huggingface.read_config(tmp_path / "export") == folders.CONFIGS["qwen3"]


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
    folders.save(tmp_path / "model", tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.eos_token_id == 1
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["pad_token_id"]) == (1, 0)


def test_a_full_folder_is_kept_unless_overwritten(folder):
    """Catches an export over somebody's model; and an overwrite that merges folders."""
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(errors.UserError, match="not empty.*overwrite"):
        folders.save(folder)
    assert (folder / "notes.txt").exists()
    folders.save(folder, folders.CONFIGS["qwen3"], overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert huggingface.read_config(folder) == folders.CONFIGS["qwen3"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Catches files that are written in place."""

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        folders.save(tmp_path / "model")
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
    broken = jax.tree.map(lambda x: x, folders.params())
    change(broken)
    with pytest.raises(errors.UserError, match=message):
        huggingface.save(
            tmp_path / "model", transformer.LanguageModel(folders.CONFIG), broken
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_architecture_has_is_not_exported(tmp_path):
    """Catches a bias that is silently left out of the export."""
    odd = dataclasses.replace(folders.CONFIG, qk_norm=True, attention_bias=True)
    with pytest.raises(errors.UserError, match="no architecture of"):
        folders.save(tmp_path / "model", odd)


def test_a_tied_head_that_is_stored_too_is_accepted(tmp_path):
    """Catches strictness about what old checkpoints do hold."""
    config = dataclasses.replace(folders.CONFIG, tied=True)
    folders.save(tmp_path / "model", config)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(
            2, np.float32
        )

    folders.edit_weights(tmp_path / "model", change)
    folders.assert_same(huggingface.load(tmp_path / "model")[1], folders.params(config))
