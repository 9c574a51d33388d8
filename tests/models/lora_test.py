"""LoRA inside the decoder: never a dense product, dropout, the readout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.methods import adapters
from ftdefense.models import transformer

from .decoder import CONFIG
from .decoder import MODEL
from .decoder import SITES
from .decoder import factors
from .decoder import forward
from .decoder import params
from .decoder import tokens


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
