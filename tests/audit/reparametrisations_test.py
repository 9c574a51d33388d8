"""Every writing is the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit.decoys import scaled_parametrisation
from ftdefense.audit.diagnostics import reparametrisations
from ftdefense.core import tree
from ftdefense.models import transformer

KEY = jax.random.key(0)
TOKENS = np.arange(12).reshape(2, 6) % 11


@functools.partial(jax.jit, static_argnames="model")
def logits(model, params):
    return model(params, jnp.asarray(TOKENS)).logits


@jax.jit
def distance(params, other):
    return tree.norm(tree.add_scale(params, -1.0, other)) / tree.norm(other)


@pytest.fixture(scope="module")
def tied():
    """Two layers whose head is the embedding; norms of their own."""
    model = transformer.LanguageModel(
        transformer.ModelConfig(
            vocab_size=29,
            width=16,
            layers=2,
            heads=4,
            kv_heads=2,
            mlp_width=24,
            tied=True,
        )
    )
    params = model.init(jax.random.key(0))
    params = tree.add_scale(params, 0.3, model.init(jax.random.key(1)))
    return model, params


@pytest.mark.parametrize("name", reparametrisations.WRITINGS)
@pytest.mark.parametrize("which", ["tiny_llama", "tied"])
def test_the_function_is_kept(name, which, request):
    """Catches a reader of a norm that is left out, and a `down` that is not permuted."""
    model, params = request.getfixturevalue(which)
    written = jax.jit(reparametrisations.WRITINGS[name])(params, KEY)
    assert jax.tree.map(jnp.shape, written) == jax.tree.map(jnp.shape, params)
    assert distance(written, params) > 1e-3
    np.testing.assert_allclose(
        logits(model, written), logits(model, params), rtol=5e-3, atol=5e-3
    )


def test_scales_are_taken_out_of_the_scaled_decoy(tiny_llama):
    """Catches a stream that is normalised by anything but its own scale."""
    _, params = tiny_llama
    decoy = scaled_parametrisation.rescaled(params, 16.0)
    plain, seen = (reparametrisations.canonical(w, KEY) for w in (params, decoy))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, seen)
