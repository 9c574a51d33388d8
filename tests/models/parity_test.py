"""The decoder against transformers' own, on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.models import generate
from ftdefense.models import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
CASES = {
    "llama": ("Llama", {}),
    "llama_tied_llama3": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama_biased_linear": (
        "Llama",
        {"attention_bias": True, "rope_parameters": LINEAR},
    ),
    "mistral_windowed": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-3}),
    "qwen2_windowed_tied": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@functools.cache
def theirs(name):
    family, extra = CASES[name]
    config = getattr(transformers, f"{family}Config")(
        **{**SHAPE, **extra},
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for sharp attention, and norm scales other than one.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    model = theirs(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path


def tokens():
    return np.random.RandomState(0).randint(1, 67, (3, 24))


def test_logits_and_greedy_continuations_agree_and_export_is_exact(case):
    """Catches rotary pairs (2i, 2i + 1), epsilon outside the root, a missing bias, a
    window off by one, a repeated instead of grouped head, and untransposed exports.
    """
    model, folder = case
    ours, params = huggingface.load(folder / "theirs")
    with torch.no_grad():
        expected = model(torch.tensor(tokens())).logits.numpy()
    logits = jax.jit(ours.__call__)(params, jnp.asarray(tokens())).logits
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=2e-4)

    prompt, mask = tokens()[:, :9].copy(), np.ones((3, 9), bool)
    mask[0, :3] = False
    prompt[0, :3] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        said = model.generate(
            torch.tensor(prompt), attention_mask=torch.tensor(mask).long(), **arguments
        )
    mine = generate.generate(
        ours, params, prompt, mask, max_new_tokens=8, eos_ids=(999,), pad_id=0
    )
    np.testing.assert_array_equal(mine, said[:, 9:].numpy())

    huggingface.save(folder / "ours", ours, params, max_shard_bytes=20_000)
    back = type(model).from_pretrained(folder / "ours", attn_implementation="eager")
    state = back.state_dict()
    assert back.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    with torch.no_grad():
        again = back(torch.tensor(tokens())).logits.numpy()
    np.testing.assert_array_equal(again, expected)


def test_padding_that_nothing_attends_to(tmp_path):
    """Catches a mask of queries in place of keys, and one that is dropped: the states
    of padding, which some defenses read, would see earlier padding.
    """
    model = theirs("llama")
    model.save_pretrained(tmp_path)
    ours, params = huggingface.load(tmp_path)
    mask = (np.arange(24) < np.array([[24], [17], [9]])).astype(np.int64)
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(mask)}
        expected = model(torch.tensor(tokens()), **given).logits.numpy()
    run = jax.jit(lambda attended: ours(params, tokens(), attended=attended).logits)
    np.testing.assert_allclose(run(mask), expected, atol=2e-4)
    plain = np.asarray(run(None))
    np.testing.assert_allclose(plain[mask > 0], expected[mask > 0], atol=2e-4)
    assert np.abs(plain - expected).max() > 0.05
