"""The toy has the interface of the decoder, in miniature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.methods import adapters
from ftdefense.models import toy

MODEL = toy.Toy()
TOKENS = jax.random.randint(jax.random.key(1), (3, 5), 0, MODEL.vocab)


def params():
    return MODEL.init(jax.random.key(0))


def test_four_leaves_and_the_sites_of_the_decoder():
    """Catches a fifth leaf, and hidden states that are not stacked."""
    assert len(jax.tree.leaves(params())) == 4
    outputs = MODEL(params(), TOKENS)
    assert outputs.logits.shape == (3, 5, 11)
    shapes = {site: x.shape for site, x in outputs.hidden.items()}
    stacked = dict.fromkeys(("attn", "mlp", "resid"), (2, 3, 5, 8))
    assert shapes == dict.fromkeys(("embed", "final"), (3, 5, 8)) | stacked


def test_it_is_causal():
    """Catches a mean over the whole sequence."""

    def logit(shift):
        def intervene(hidden, where, layer, tap):
            return hidden + shift if where == "embed" else hidden

        return MODEL(params(), TOKENS, intervene=intervene).logits[:, 2].sum()

    grads = jax.grad(logit)(jnp.zeros((3, 5, 8)))
    np.testing.assert_array_equal(grads[:, 3:], 0)
    assert np.all(np.any(grads[:, :3] != 0, axis=-1))


@pytest.mark.parametrize("site", ["attn", "mlp", "resid"])
def test_taps_reach_their_layer(site):
    """Catches taps that are not sliced by layer."""

    def intervene(hidden, where, layer, tap):
        return hidden + tap if where == site else hidden

    taps = jnp.zeros((2, 3, 5, 8)).at[1].set(1.0)
    base = MODEL(params(), TOKENS).hidden[site]
    moved = MODEL(params(), TOKENS, intervene=intervene, taps=taps).hidden[site]
    np.testing.assert_array_equal(moved[0], base[0])
    np.testing.assert_allclose(moved[1], base[1] + 1, rtol=1e-5)


def test_lora_unmerged_equals_merged_and_drops_with_a_key():
    """Catches a kernel that LoRA does not reach, and dropout without effect."""
    adapter = adapters.LoRA(rank=2, alpha=2.0)
    lora = adapter.init(params(), jax.random.key(2))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    merged = MODEL(adapter.merge(lora, params()), TOKENS).logits
    unmerged = MODEL(params(), TOKENS, lora=lora).logits
    assert not np.allclose(merged, MODEL(params(), TOKENS).logits, atol=1e-2)
    np.testing.assert_allclose(unmerged, merged, atol=1e-5)
    dropped = MODEL(
        params(), TOKENS, lora=lora, rng=jax.random.key(0), dropout=jnp.float32(0.5)
    )
    assert not np.allclose(dropped.logits, merged, atol=1e-3)


def test_bfloat16_parameters_keep_their_dtype_in_the_stream():
    """Catches a float32 constant that widens the stream, which breaks the scan."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())

    def intervene(hidden, where, layer, tap):
        return hidden + jnp.float32(1)

    outputs = jax.eval_shape(lambda p: MODEL(p, TOKENS, intervene=intervene), narrow)
    assert outputs.hidden["resid"].dtype == jnp.bfloat16
    assert outputs.logits.dtype == jnp.float32


def test_readout_of_the_last_hidden_state_is_the_logits():
    """Catches a head read from another place than the forward pass's."""
    outputs = MODEL(params(), TOKENS)
    logits = MODEL.readout(params(), outputs.hidden["resid"][-1])
    np.testing.assert_array_equal(logits, outputs.logits)


def test_padding_that_nothing_attends_to_is_left_out_of_means():
    """Catches a mask of queries, and a mean over the length in place of what counts."""
    model = toy.Toy()
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 4), 0, 11)
    masked = model(params, tokens, attended=jnp.array([[1, 1, 0, 0]])).hidden
    whole = model(params, tokens).hidden
    embed_LxD = whole["embed"][0]
    mean_D = (embed_LxD[0] + embed_LxD[1]) / 2
    np.testing.assert_allclose(masked["attn"][0, 0, 3], mean_D, rtol=1e-6)
    np.testing.assert_allclose(
        masked["resid"][:, 0, :2], whole["resid"][:, 0, :2], rtol=1e-6
    )
