"""Another writing of the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit.diagnostics import reparametrisations
from ftdefense.models import transformer

SHAPE = {"vocab_size": 31, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2}
SHAPE |= {"mlp_width": 24, "max_length": 16}


def _canonical(params):
    return jax.jit(reparametrisations.canonical)(params, jax.random.key(0))


def scrambled(params, k):
    """A release whose hidden units and norms are written in wild scales."""
    layers = jax.tree.map(lambda x: x, params["layers"])
    layers["mlp"]["up"]["kernel"] = layers["mlp"]["up"]["kernel"] * k
    layers["mlp"]["down"]["kernel"] = layers["mlp"]["down"]["kernel"] / k
    layers["attention"]["v"]["kernel"] = layers["attention"]["v"]["kernel"] / k
    layers["attention"]["o"]["kernel"] = layers["attention"]["o"]["kernel"] * k
    layers["mlp_norm"]["scale"] = layers["mlp_norm"]["scale"] / k
    for name in ("gate", "up"):
        layers["mlp"][name]["kernel"] = layers["mlp"][name]["kernel"] * k
    return {**params, "layers": layers}


@pytest.mark.parametrize("tied", [False, True])
def test_the_function_stays_and_the_scales_go(tied):
    """Catches a factor that one kernel gets and the other does not, a head that is tied
    to the embedding and folded all the same, and norms that keep their scale.
    """
    model = transformer.LanguageModel(transformer.ModelConfig(**SHAPE, tied=tied))
    plain = model.init(jax.random.key(0))
    wild = scrambled(plain, 1e3)
    tokens = jnp.arange(12).reshape(2, 6)
    run = jax.jit(model)
    logits = run(plain, tokens).logits
    one, other = _canonical(plain), _canonical(wild)
    for params in (one, other):
        np.testing.assert_allclose(
            run(params, tokens).logits, logits, rtol=1e-3, atol=1e-3
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other
    )
    assert np.all(np.asarray(one["layers"]["mlp_norm"]["scale"]) == 1)
