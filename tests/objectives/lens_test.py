"""The logit lens and its masks, with the published code's quirks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.models import toy
from ftdefense.objectives import lens
from ftdefense.objectives import losses

from ..conftest import batch

MODEL = toy.Toy()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def of_tokens(*rows):
    tokens = np.array(rows, np.int32)
    return types.Batch(tokens, np.ones(tokens.shape, np.float32))


# The rows part at position 2; position 4 agrees by chance; id 0 ends the first.
LEFT, RIGHT = of_tokens([7, 3, 5, 2, 9, 4, 0]), of_tokens([7, 3, 6, 1, 9, 8, 8])


def test_divergence_ignores_common_changes():
    """Catches a mask that looks at the tokens themselves."""
    expected = [[0, 0, 1, 1, 0, 1, 1]]
    np.testing.assert_array_equal(lens.divergence(LEFT, RIGHT), expected)
    other = [x.replace(tokens=x.tokens + 3) for x in (LEFT, RIGHT)]
    np.testing.assert_array_equal(lens.divergence(*other), expected)


def test_rows_without_a_partner_are_refused():
    """Catches one refusal that is spread over all harmful rows."""
    two = of_tokens([7, 3, 5, 2, 9, 4, 0], [7, 3, 5, 2, 9, 4, 0])
    with pytest.raises(errors.UserError, match="one to one"):
        lens.divergence(two, RIGHT)


def test_quirks_of_the_masked_cross_entropy():
    """Catches a proper shift of the mask: the first diverging token costs ln V."""
    logits = jax.random.normal(jax.random.key(0), (1, 7, 11))
    asked = lens.targets(LEFT, RIGHT, "divergence")
    nats = losses.cross_entropy(logits[:, :-1], LEFT.tokens[:, 1:])[0]
    # Targets 2 (read at 1: masked), 3 (read at 2), 5 (read at 4: masked), not 6 (id 0).
    expected = (2 * np.log(11) + nats[2]) / 3
    value, grad = jax.value_and_grad(lens.cross_entropy)(logits, asked)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert np.any(grad[0, 2] != 0)
    np.testing.assert_array_equal(np.delete(grad[0], 2, 0), 0.0)


def test_response_mask_is_the_ordinary_loss():
    """Catches zeroed logits, or id 0 ignored, in the corrected form."""
    data, pair = batch(1), batch(2)
    outputs = MODEL(MODEL.init(jax.random.key(0)), data.tokens)
    total, weight = losses.weighted_sums(outputs, data)
    value = lens.cross_entropy(outputs.logits, lens.targets(data, pair, "response"))
    np.testing.assert_allclose(value, total / weight, rtol=1e-6)


def test_no_target_costs_nothing():
    """Catches 0 / 0 where paired rows are equal."""
    logits = jax.random.normal(jax.random.key(0), (1, 7, 11))
    asked = lens.targets(LEFT, LEFT, "divergence")
    value, grad = jax.value_and_grad(lens.cross_entropy)(logits, asked)
    assert value == 0
    np.testing.assert_array_equal(grad, 0.0)


def test_ascent_of_uniform_logits():
    """V = 32000, 32 layers: 11.6878, log 2.4585. Catches N + 2 or N in the divisor."""
    layers, shape = 32, (1, 2, 3)
    hidden = {"embed": jnp.ones(shape), "final": jnp.ones(shape)}
    hidden["resid"] = jnp.ones((layers, *shape))
    outputs = types.Outputs(jnp.zeros((1, 2, 32000)), hidden)
    value = lens.ascent(
        lambda params, x: jnp.zeros((1, 2, 32000)),
        None,
        outputs,
        lens.targets(of_tokens([1, 2]), of_tokens([3, 4]), "response"),
    )
    np.testing.assert_allclose(value, 11.6878, atol=5e-5)
    np.testing.assert_allclose(np.log(value), 2.4585, atol=5e-5)
    np.testing.assert_allclose(value, 1 + np.log(32000) * 34 / 33, rtol=1e-12)


def test_ascent_reads_every_hidden_state():
    """Catches a lens without the embedding, or one that reads resid[-1] for final."""
    data, params = batch(1), MODEL.init(jax.random.key(0))
    asked = lens.targets(data, batch(2), "response")
    outputs = MODEL(params, data.tokens)
    hidden = {**outputs.hidden, "final": 2 * outputs.hidden["final"]}
    outputs = outputs.replace(hidden=hidden)
    states = (hidden["embed"], hidden["resid"][0], hidden["final"])
    np.testing.assert_array_equal(lens.hidden_states(outputs), jnp.stack(states))
    parts = [outputs.logits, *(MODEL.readout(params, x) for x in states)]
    expected = 1 + sum(lens.cross_entropy(x, asked) for x in parts) / 3
    value = lens.ascent(MODEL.readout, params, outputs, asked)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_layers_are_clipped_or_refused():
    """Catches an index that wraps around, and one beyond the model."""
    assert lens.chosen((20, 1, 10), 2) == (1, 2)
    for wrong in ((), (-1, 2)):
        with pytest.raises(errors.UserError):
            lens.chosen(wrong, 2)


def test_unknown_mask_is_a_user_error():
    """Catches a typing error that silently takes the other mask."""
    with pytest.raises(errors.UserError, match="divergence"):
        lens.targets(LEFT, RIGHT, "divergance")
