"""What kernels read, at the paths of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.methods import adapters
from ftdefense.models import toy
from ftdefense.models import transformer

CONFIG = transformer.ModelConfig(
    vocab_size=23, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, head_dim=6
)
MODELS = {"toy": toy.Toy(), "decoder": transformer.LanguageModel(CONFIG)}
TOKENS = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
both = pytest.mark.parametrize("name", MODELS)


@both
def test_a_patch_moves_the_output_by_what_is_read(name):
    """x a b at the last kernel before a site. Catches an input of another module or
    layer, and one that LoRA has not reached."""
    model = MODELS[name]
    params = model.init(jax.random.key(0))
    last = {"toy": ("mix", "down", "mlp"), "decoder": ("attention", "o", "attn")}
    group, kernel, site = last[name]
    weights = params["layers"][group][kernel]["kernel"]
    lora = adapters.LoRA(rank=2).init(params, jax.random.key(2))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    seen = jax.jit(model.inputs)(params, TOKENS, lora=lora)
    read = seen["layers"][group][kernel]["input"]
    assert read.shape == (weights.shape[0], 2, 5, weights.shape[1])
    factors = lora["layers"][group][kernel]
    product = weights + factors["a"] @ factors["b"]
    found = jax.jit(model)(params, TOKENS, lora=lora).hidden[site]
    np.testing.assert_allclose(
        jnp.einsum("nbli,nio->nblo", read, product), found, atol=1e-5
    )


def test_queries_keys_and_values_read_the_normed_stream():
    """Catches the stream before the norm, and a norm of another layer."""
    model = MODELS["decoder"]
    params = model.init(jax.random.key(0))
    params["layers"]["attention_norm"]["scale"] *= 1.5
    hidden = jax.jit(model)(params, TOKENS).hidden
    seen = jax.jit(model.inputs)(params, TOKENS)["layers"]
    x = jnp.concatenate([hidden["embed"][None], hidden["resid"][:-1]])
    normed = 1.5 * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    for kernel in "qkv":
        read = seen["attention"][kernel]["input"]
        np.testing.assert_allclose(read, normed, rtol=1e-4, atol=1e-5)


@both
def test_outputs_hold_no_inputs(name):
    """Catches inputs that every forward pass carries along."""
    model = MODELS[name]
    outputs = model(model.init(jax.random.key(0)), TOKENS)
    assert set(outputs.hidden) == {"embed", "attn", "mlp", "resid", "final"}
