"""The decoder: parameters, causality, scan and remat, dtypes, what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.models import transformer

from .decoder import CONFIG
from .decoder import MODEL
from .decoder import SITES
from .decoder import add_tap
from .decoder import factors
from .decoder import forward
from .decoder import params
from .decoder import tokens


def test_params_are_plain_float32_at_the_agreed_paths():
    """Catches a renamed module, and `nn.with_partitioning` boxes."""
    shapes = jax.tree.map(lambda x: x.shape, MODEL.init(jax.random.key(0)))
    kernels = {"q": 32, "k": 16, "v": 16}
    attention = {
        name: {"kernel": (3, 16, width), "bias": (3, width)}
        for name, width in kernels.items()
    }
    attention |= {"o": {"kernel": (3, 32, 16)}}
    attention |= {"q_norm": {"scale": (3, 8)}, "k_norm": {"scale": (3, 8)}}
    assert shapes == {
        "embed": {"embedding": (23, 16)},
        "layers": {
            "attention_norm": {"scale": (3, 16)},
            "attention": attention,
            "mlp_norm": {"scale": (3, 16)},
            "mlp": {
                "gate": {"kernel": (3, 16, 24)},
                "up": {"kernel": (3, 16, 24)},
                "down": {"kernel": (3, 24, 16)},
            },
        },
        "final_norm": {"scale": (16,)},
        "lm_head": {"kernel": (16, 23)},
    }
    dtypes = {x.dtype for x in jax.tree.leaves(MODEL.init(jax.random.key(0)))}
    assert dtypes == {jnp.dtype("float32")}


def test_layers_differ_and_initial_scales_are_as_configured():
    """Catches split_rngs={"params": False}, and a forgotten 1 / sqrt(2 N)."""
    config = dataclasses.replace(
        CONFIG, width=64, mlp_width=256, init_scale=0.02, residual_init=True
    )
    layers = transformer.LanguageModel(config).init(jax.random.key(0))["layers"]
    gate, down = layers["mlp"]["gate"]["kernel"], layers["mlp"]["down"]["kernel"]
    assert not np.allclose(gate[0], gate[1])
    np.testing.assert_allclose(jnp.std(gate), 0.02, rtol=0.03)
    np.testing.assert_allclose(jnp.std(down), 0.02 / 6**0.5, rtol=0.03)


def test_outputs_have_the_agreed_shapes():
    """Catches hidden states stacked along another axis than the first."""
    outputs = forward(params(), tokens())
    assert outputs.logits.shape == (2, 7, 23)
    shapes = {site: x.shape for site, x in outputs.hidden.items()}
    stacked = dict.fromkeys(SITES, (3, 2, 7, 16))
    assert shapes == dict.fromkeys(("embed", "final"), (2, 7, 16)) | stacked


def test_hidden_states_add_up_to_the_residual_stream():
    """Catches hidden["attn"] taken before the output projection, or after the add."""
    hidden = forward(params(), tokens()).hidden
    before = jnp.concatenate([hidden["embed"][None], hidden["resid"][:-1]])
    np.testing.assert_allclose(
        before + hidden["attn"] + hidden["mlp"], hidden["resid"], atol=1e-5
    )


def test_model_is_equal_and_hashed_by_its_config():
    """Catches a LanguageModel compared by identity: every step would compile anew."""
    twin = transformer.LanguageModel(dataclasses.replace(CONFIG))
    assert twin == MODEL and hash(twin) == hash(MODEL)
    assert transformer.LanguageModel(dataclasses.replace(CONFIG, tied=True)) != MODEL


def test_loss_at_a_position_ignores_later_embeddings():
    """Catches `is_causal=False`, and a mask that is off by one."""
    t, weights = 3, params()

    def loss(shift):
        def intervene(hidden, where, layer, tap):
            return hidden + shift if where == "embed" else hidden

        return MODEL(weights, tokens(), intervene=intervene).logits[:, t, 5].sum()

    grads = jax.jit(jax.grad(loss))(jnp.zeros((2, 7, 16)))
    np.testing.assert_array_equal(grads[:, t + 1 :], 0)
    assert np.all(np.any(grads[:, : t + 1] != 0, axis=-1))


def test_sliding_window_hides_what_is_too_far_back():
    """Catches `local_window_size=window` for window - 1: one layer, window 3."""
    config = dataclasses.replace(CONFIG, layers=1, sliding_window=3)
    model = transformer.LanguageModel(config)
    one = jax.tree.map(lambda x: x, params())
    one["layers"] = jax.tree.map(lambda x: x[:1], one["layers"])

    def logit(shift):
        def intervene(hidden, where, layer, tap):
            return hidden + shift if where == "embed" else hidden

        return model(one, tokens(), intervene=intervene).logits[:, 5, 4].sum()

    grads = jax.jit(jax.grad(logit))(jnp.zeros((2, 7, 16)))
    reached = np.any(grads != 0, axis=(0, 2))
    assert list(reached) == [False, False, False, True, True, True, False]


def gradient(**change):
    """Of a loss through every parameter, LoRA and dropout."""
    model = transformer.LanguageModel(dataclasses.replace(CONFIG, **change))

    def loss(weights):
        arguments = {"lora": factors(0.3), "rng": jax.random.key(5), "dropout": 0.3}
        return jnp.mean(jnp.square(model(weights, tokens(), **arguments).logits))

    return jax.jit(jax.grad(loss))(params())


def test_scan_and_remat_change_no_gradient():
    """Catches a rematerialised block that draws another dropout mask."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    plain = gradient()
    for change in ({"unroll": 1}, {"remat": True}, {"remat": True, "unroll": 1}):
        jax.tree.map(close, gradient(**change), plain)


def test_remat_recomputes_the_block():
    """Catches `remat` that is read nowhere."""

    def program(remat):
        model = transformer.LanguageModel(dataclasses.replace(CONFIG, remat=remat))

        def loss(weights):
            return model(weights, tokens()).logits.sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params()))

    assert "checkpoint" in program(True) or "remat" in program(True)
    assert "checkpoint" not in program(False) and "remat" not in program(False)


def test_bfloat16_computes_narrow_and_returns_wide():
    """Catches logits in bfloat16, norms in bfloat16, and narrow parameters."""
    model = transformer.LanguageModel(
        dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    )
    outputs = forward(params(), tokens(), model=model)
    assert outputs.logits.dtype == jnp.float32
    assert {x.dtype for x in outputs.hidden.values()} == {jnp.dtype("bfloat16")}
    wide = forward(params(), tokens()).logits
    error = jnp.abs(outputs.logits - wide).mean() / jnp.abs(wide).mean()
    assert 1e-5 < error < 0.05
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    # A strong float32 tap must not widen the stream.
    taps = jnp.zeros((3, 2, 7, 16), jnp.float32)
    hooked = forward(
        params(), tokens(), model=model, intervene=add_tap("attn"), taps=taps
    )
    assert hooked.hidden["resid"].dtype == jnp.bfloat16


def test_vmap_over_parameters_equals_a_loop():
    """Catches a shape that is read where only a tracer's is known: sweeps vmap."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params())
    mapped = jax.jit(jax.vmap(lambda p: MODEL(p, tokens()).logits))(stacked)
    for i in range(2):
        one = forward(jax.tree.map(lambda x, i=i: x[i], stacked), tokens()).logits
        np.testing.assert_allclose(mapped[i], one, atol=1e-5)


def test_too_long_sequences_are_refused():
    """Catches silent extrapolation beyond the trained positions."""
    with pytest.raises(errors.UserError, match="max_length is 16"):
        MODEL(params(), tokens(1, 17))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"compute_dtype": "bflot16"}, "did you mean 'bfloat16'"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    """Catches a check that is dropped: shapes would fail deep inside."""
    with pytest.raises(errors.UserError, match=message):
        dataclasses.replace(CONFIG, **change)
