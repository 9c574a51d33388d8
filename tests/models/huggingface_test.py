"""Hugging Face folders: logits and greedy text against transformers, bits both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from ftdefense.core import errors
from ftdefense.models import generate
from ftdefense.models import huggingface

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("Llama", {}),
    "tied_llama3": ("Llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "biased": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 5}),
}


def theirs(torch, folder, case):
    family, extra = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_equal_transformers(case, tmp_path):
    """Catches a swapped rotary half, a wrong norm epsilon, group order or scaling."""
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    reference = theirs(torch, tmp_path / "in", case)
    model, params = huggingface.load(tmp_path / "in")
    tokens = np.random.default_rng(0).integers(0, 67, (3, 20))
    wanted = reference(torch.tensor(tokens)).logits.detach().numpy()
    got = np.asarray(model(params, jnp.asarray(tokens)).logits)
    assert np.abs(got - wanted).max() <= 2e-4
    text = reference.generate(
        torch.tensor(tokens[:, :8]),
        attention_mask=torch.ones(3, 8, dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 8:].numpy()
    options = {"max_new_tokens": 8, "eos_ids": (99,), "pad_id": 0}
    mine = generate.generate(
        model, params, tokens[:, :8], np.ones((3, 8), bool), **options
    )
    np.testing.assert_array_equal(mine, text)

    # Written in shards, read by both, not a bit changed.
    huggingface.save(tmp_path / "out", model, params, max_shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    again = type(reference).from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    _, back = huggingface.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.fixture
def folder(tmp_path, tiny_llama):
    model, params = tiny_llama
    huggingface.save(tmp_path / "model", model, params)
    return tmp_path / "model"


def rewrite(folder, change):
    import safetensors.numpy

    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def fails(folder, *words):
    with pytest.raises(errors.UserError) as caught:
        huggingface.load(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in (str(folder), *words)), said


def test_missing_tensor_is_named(folder):
    """Catches a loader that fills holes with zeros."""
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    fails(folder, "model.layers.1.mlp.up_proj.weight")


def test_extra_tensor_is_named(folder):
    """Catches a loader that ignores what it does not know."""
    rewrite(folder, lambda t: t.update({"model.stray": np.zeros(2, np.float32)}))
    fails(folder, "model.stray")


def test_misshapen_tensor_is_named(folder):
    """Catches a loader that broadcasts, and shapes shown transposed."""
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: np.zeros((3, 5), np.float32)}))
    fails(folder, name, "[3, 5]", "[24, 16]")


def test_truncated_file_is_named(folder):
    """Catches a traceback of the reader in place of a line for the user."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fails(folder, "model.safetensors", "truncated")


def test_unknown_architecture_is_named(folder):
    """Catches a silent fall-back to Llama."""
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "GPT2LMHeadModel", "LlamaForCausalLM")


def test_never_overwrites(folder, tiny_llama):
    """Catches an export over somebody's weights."""
    with pytest.raises(errors.UserError, match="not empty"):
        huggingface.save(folder, *tiny_llama)
