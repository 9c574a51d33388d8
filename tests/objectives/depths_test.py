"""Published layers at another depth, and a model that ends early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.models import toy
from ftdefense.objectives import depths

from ..conftest import batch


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(32, (10, 20)), (64, (20, 40)), (8, (2, 5)), (2, (1,)), (1, (1,))],
)
def test_published_hidden_states_keep_their_depth(blocks, expected):
    """Catches a rounding up, or the embedding in a shallow model."""
    assert depths.hidden_states((), (20, 10), blocks) == expected


def test_given_hidden_states_are_kept():
    """Catches a scaling of what the user asked for."""
    assert depths.hidden_states((4, 3), (10, 20), 4) == (3, 4)


@pytest.mark.parametrize(
    ("blocks", "expected"), [(32, (8, 16, 24, 30)), (4, (1, 2, 3)), (2, (0, 1))]
)
def test_published_blocks_keep_their_depth(blocks, expected):
    """Catches an index that the model does not have."""
    assert depths.block_indices((), (8, 16, 24, 30), blocks) == expected


@pytest.mark.parametrize("layers", [(0, 2), (-1,)])
def test_blocks_that_are_not_there(layers):
    """Catches an index that JAX would clip, or count from the end."""
    with pytest.raises(errors.UserError, match="0 to 1"):
        depths.block_indices(layers, (8,), 2)


def test_truncated():
    """One block of two: logits read off its output, and no gradient for the other."""
    model, tokens = toy.Toy(), batch(1).tokens
    params = model.init(jax.random.key(0))
    whole, cut = model(params, tokens), depths.truncated(model, 1, 2)
    outputs = cut(params, tokens)
    resid_BxLxD = whole.hidden["resid"][0]
    np.testing.assert_array_equal(outputs.hidden["resid"], resid_BxLxD[None])
    np.testing.assert_array_equal(outputs.hidden["final"], resid_BxLxD)
    np.testing.assert_allclose(
        outputs.logits, model.readout(params, resid_BxLxD), rtol=1e-5, atol=1e-6
    )
    grads = jax.grad(lambda p: jnp.sum(cut(p, tokens).logits ** 2))(params)
    up = grads["layers"]["mix"]["up"]["kernel"]
    assert np.any(up[0]) and not np.any(up[1])
    assert depths.truncated(model, 2, 2) is model
    assert depths.count(model, params, tokens) == 2
