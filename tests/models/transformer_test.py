"""The decoder: its hooks, its LoRA, its causality, its cache and its dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.models import transformer
from ftdefense.objectives import losses

CONFIG = transformer.ModelConfig(
    vocab_size=23,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=24,
    max_length=16,
    qk_norm=True,
    attention_bias=True,
)
MODEL = transformer.LanguageModel(CONFIG)
SITES = ("attn", "mlp", "resid")


@functools.cache
def params():
    """Random everywhere: also biases and scales, which start at 0 and 1."""
    fresh = MODEL.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(fresh)
    rngs = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.1 * jax.random.normal(r, x.shape)
        for x, r in zip(leaves, rngs, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def tokens(batch=2, length=7, seed=2):
    return jax.random.randint(
        jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size
    )


def add_tap(site):
    def intervene(hidden, where, layer, tap):
        return hidden + tap if where == site else hidden

    return intervene


@functools.partial(jax.jit, static_argnames=("model", "intervene"))
def forward(params, tokens, model=MODEL, intervene=None, **arguments):
    return model(params, tokens, intervene=intervene, **arguments)


def factors(b_scale, rank=2):
    """LoRA at all seven kernels."""
    lora = adapters.LoRA(rank=rank, alpha=float(rank)).init(params(), jax.random.key(3))
    leaves, structure = jax.tree.flatten(lora)
    rngs = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            x + b_scale * jax.random.normal(r, x.shape)
            for x, r in zip(leaves, rngs, strict=True)
        ],
    )


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


@pytest.mark.parametrize("site", SITES)
def test_zero_taps_change_nothing(site):
    """Catches a hook that rescales: bit-equal logits at a zero shift."""
    zeros = jnp.zeros((3, 2, 7, 16))
    base = forward(params(), tokens())
    shifted = forward(params(), tokens(), intervene=add_tap(site), taps=zeros)
    np.testing.assert_array_equal(base.logits, shifted.logits)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_shift_reaches_its_layer_and_later_ones_only(site, layer):
    """Catches taps given to the wrong layer, or a site called in the wrong place."""
    shift = jnp.zeros((3, 2, 7, 16)).at[layer].set(0.5)
    base = forward(params(), tokens()).hidden
    moved = forward(params(), tokens(), intervene=add_tap(site), taps=shift).hidden
    for other in SITES:
        np.testing.assert_array_equal(moved[other][:layer], base[other][:layer])
    np.testing.assert_allclose(
        moved[site][layer], base[site][layer] + 0.5, rtol=1e-5, atol=1e-5
    )
    order = SITES.index(site)
    for earlier in SITES[:order]:
        np.testing.assert_array_equal(moved[earlier][layer], base[earlier][layer])
    for later in SITES[order + 1 :]:
        assert not np.allclose(moved[later][layer], base[later][layer])


def test_the_embedding_site_has_no_tap_and_is_seen_by_all_layers():
    """Catches taps at the embedding, where there is no layer to slice them by."""
    seen = []

    def intervene(hidden, where, layer, tap):
        if where != "embed":
            return hidden
        seen.append(tap)
        return hidden + 1.0

    base = forward(params(), tokens()).hidden
    moved = forward(params(), tokens(), intervene=intervene, taps=jnp.ones(3)).hidden
    assert seen == [None]
    np.testing.assert_allclose(moved["embed"], base["embed"] + 1)
    assert not np.allclose(moved["attn"][0], base["attn"][0])


def test_the_hook_is_told_its_layer():
    """Catches a constant layer index inside the scan."""

    def intervene(hidden, where, layer, tap):
        return jnp.where(layer == 1, 0.0, hidden) if where == "mlp" else hidden

    hidden = forward(params(), tokens(), intervene=intervene).hidden["mlp"]
    assert [bool(jnp.all(x == 0)) for x in hidden] == [False, True, False]


def loss_of_taps(taps, params, batch, site="attn"):
    loss = losses.next_token(MODEL)
    return loss(params, batch, intervene=add_tap(site), taps=taps)


def test_tap_gradients_vanish_after_the_last_supervised_token():
    """Catches attention to the future; the tap at the last input matters."""
    weights = jnp.zeros((2, 7)).at[:, 4].set(1.0)  # Predicted from position 3.
    batch = types.Batch(tokens(), weights)
    zeros = jnp.zeros((3, 2, 7, 16))
    grads = jax.jit(jax.grad(loss_of_taps))(zeros, params(), batch)
    np.testing.assert_array_equal(grads[:, :, 4:], 0)
    assert np.all(np.any(grads[:, :, 3] != 0, axis=-1))


@pytest.mark.parametrize("unroll", [1, 3])
def test_gradients_of_taps_compute_no_gradients_of_weights(unroll):
    """Catches a parameter that is differentiated along: the flops would be 3 forwards.

    Forward and input gradients cost the same products, two forwards in all.
    """
    config = dataclasses.replace(CONFIG, width=64, mlp_width=128, layers=3)
    model = transformer.LanguageModel(dataclasses.replace(config, unroll=unroll))
    weights = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: types.Batch(tokens(8, 16), jnp.ones((8, 16))))
    taps = jax.ShapeDtypeStruct((3, 8, 16, 64), jnp.float32)

    def loss(taps, weights, batch):
        return losses.next_token(model)(
            weights, batch, intervene=add_tap("attn"), taps=taps
        )

    def flops(function):
        compiled = jax.jit(function).lower(taps, weights, batch).compile()
        return compiled.cost_analysis()["flops"]

    once = flops(loss)
    assert flops(jax.grad(loss)) < 2.4 * once
    assert flops(jax.grad(loss, argnums=1)) > 2.7 * once


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


def test_lora_with_zero_b_is_the_base():
    """Catches a LoRA delta that is scaled, or an A that is applied to the output."""
    lora = adapters.LoRA(rank=2).init(params(), jax.random.key(3))
    base = forward(params(), tokens())
    adapted = forward(params(), tokens(), lora=lora)
    np.testing.assert_array_equal(base.logits, adapted.logits)


def test_unmerged_lora_equals_merged():
    """Catches a projection that does not read its factors, and swapped A and B."""
    lora = factors(0.3)
    adapter = adapters.LoRA(rank=2, alpha=2.0)
    merged = forward(adapter.merge(lora, params()), tokens())
    unmerged = forward(params(), tokens(), lora=lora)
    base = forward(params(), tokens())
    assert not np.allclose(base.logits, merged.logits, atol=0.1)
    np.testing.assert_allclose(unmerged.logits, merged.logits, atol=2e-4)
    for site in SITES:
        np.testing.assert_allclose(
            unmerged.hidden[site], merged.hidden[site], atol=2e-4
        )


def test_lora_on_one_projection_and_on_the_head():
    """Catches a collection that must be complete, and a head without LoRA."""
    lora = {"lm_head": {"a": jnp.ones((16, 1)), "b": jnp.ones((1, 23))}}
    base = forward(params(), tokens()).logits
    delta = forward(params(), tokens(), lora=lora).logits - base
    first = jnp.broadcast_to(delta[..., :1], delta.shape)
    np.testing.assert_allclose(delta, first, atol=1e-5)
    assert np.any(np.abs(delta) > 1e-3)


def product_shapes(jaxpr):
    """Shapes of the results of all matrix products in a program, also nested ones."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from product_shapes(inner)


def test_lora_forms_no_dense_delta_and_no_dense_gradient():
    """Catches `x @ (W + A @ B)`: no product has the shape of a kernel."""

    def loss(lora, params):
        return MODEL(params, tokens(), lora=lora).logits.sum()

    def shapes(argument):
        program = jax.make_jaxpr(jax.grad(loss, argnums=argument))
        return set(product_shapes(program(factors(0.3), params()).jaxpr))

    kernels = {(16, 24), (24, 16), (16, 32), (32, 16)}
    assert not kernels & shapes(0)
    assert kernels & shapes(1)


def test_dropout_depends_on_the_key_and_vanishes_at_rate_zero():
    """Catches a key that is not used, and a mask that ignores the rate."""

    def run(seed, rate):
        rng = jax.random.key(seed)
        lora = factors(0.3)
        return forward(params(), tokens(), lora=lora, rng=rng, dropout=rate).logits

    np.testing.assert_array_equal(run(0, 0.5), run(0, 0.5))
    assert not np.allclose(run(0, 0.5), run(1, 0.5), atol=1e-3)
    undropped = forward(params(), tokens(), lora=factors(0.3)).logits
    np.testing.assert_allclose(run(0, 0.0), undropped, atol=1e-5)


def test_dropout_masks_are_unbiased_and_independent():
    """Catches a missing 1 / (1 - rate), and a key shared by layers or projections."""
    config = dataclasses.replace(CONFIG, mlp_width=16)
    model = transformer.LanguageModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    weights = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    weights["embed"]["embedding"] = jnp.ones((23, 16))
    weights["layers"]["mlp_norm"]["scale"] = jnp.ones((3, 16))
    eye = jnp.broadcast_to(jnp.eye(16), (3, 16, 16))
    weights["layers"]["mlp"]["down"]["kernel"] = eye
    # Every layer sees ones; gate and up return what their masks leave of them, and
    # silu(gate) * up is not zero only where both keep.
    factor = {"a": eye, "b": eye}
    lora = {"layers": {"mlp": {"gate": factor, "up": factor}}}

    def intervene(hidden, where, layer, tap):
        return jnp.ones_like(hidden) if where == "resid" else hidden

    mlp = forward(
        weights,
        tokens(8, 16),
        model=model,
        lora=lora,
        rng=jax.random.key(0),
        dropout=0.5,
        intervene=intervene,
    ).hidden["mlp"]
    kept = np.asarray(mlp != 0)
    assert not np.array_equal(kept[0], kept[1])
    np.testing.assert_allclose(kept.mean(), 0.25, atol=0.02)
    np.testing.assert_allclose(mlp[kept], 4 / (1 + np.exp(-2)), rtol=1e-4)


@pytest.mark.parametrize("lora_on", [False, True])
def test_cached_decoding_equals_the_full_forward(lora_on):
    """Catches a cache written at the wrong slot, or positions that start anew."""
    lora = factors(0.3) if lora_on else None
    full = forward(params(), tokens(), lora=lora).logits
    cache = MODEL.init_cache(2, 9)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    decode = jax.jit(MODEL.decode)
    parts = []
    for first, last in ((0, 4), (4, 5), (5, 7)):
        step = slice(first, last)
        logits, cache = decode(
            params(), tokens()[:, step], positions[:, step], cache, lora=lora
        )
        parts.append(logits)
    assert int(cache["end"]) == 7
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5)


def test_cached_decoding_keeps_to_the_sliding_window():
    """Catches a window that only the training forward knows."""
    model = transformer.LanguageModel(dataclasses.replace(CONFIG, sliding_window=3))
    full = forward(params(), tokens(), model=model).logits
    unlimited = forward(params(), tokens()).logits
    assert not np.allclose(full[:, -1], unlimited[:, -1], atol=1e-3)
    cache = model.init_cache(2, 7)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    decode = jax.jit(model.decode)
    _, cache = decode(params(), tokens()[:, :6], positions[:, :6], cache)
    last, _ = decode(params(), tokens()[:, 6:], positions[:, 6:], cache)
    np.testing.assert_allclose(last[:, 0], full[:, -1], atol=1e-5)


def test_interventions_act_in_cached_decoding():
    """Catches a `decode` that drops the hook: steering would not steer."""
    shift = 0.5 * jnp.ones((3, 16))

    def intervene(hidden, where, layer, tap):
        return hidden + tap[None, None] if where == "resid" else hidden

    full = forward(params(), tokens(), intervene=intervene, taps=shift).logits
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    decode = jax.jit(functools.partial(MODEL.decode, intervene=intervene))
    cache = MODEL.init_cache(2, 7)
    logits, _ = decode(params(), tokens(), positions, cache, taps=shift)
    np.testing.assert_allclose(logits, full, atol=1e-5)


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


@pytest.mark.parametrize("tied", [False, True])
def test_readout_norms_and_reads_the_residual_stream(tied):
    """Catches a lens without the last norm, or one that forgets the adapter."""
    model = transformer.LanguageModel(
        transformer.ModelConfig(
            vocab_size=23,
            width=16,
            layers=2,
            heads=2,
            kv_heads=1,
            mlp_width=24,
            max_length=16,
            tied=tied,
        )
    )
    params = model.init(jax.random.key(0))
    # The norm is idempotent but for its scale.
    params["final_norm"]["scale"] = jnp.linspace(0.5, 2.0, 16)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    adapter = adapters.LoRA(rank=2, targets=("q",) if tied else ("q", "lm_head"))
    factors = jax.tree.map(lambda x: x + 0.3, adapter.init(params, jax.random.key(1)))
    outputs = jax.jit(adapter.bind(model, params))(factors, tokens)
    read = jax.jit(adapter.bind_readout(model, params))
    logits = read(factors, outputs.hidden["resid"][-1])
    np.testing.assert_allclose(logits, outputs.logits, rtol=1e-5, atol=1e-5)
    assert np.any(np.abs(read(factors, outputs.hidden["final"]) - logits) > 1e-3)
