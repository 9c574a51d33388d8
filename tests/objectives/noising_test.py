"""TokenBuncher's noised targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.objectives import noising

KEY, IDS = jax.random.key(0), jnp.asarray([[1, 4], [0, 2]])


@pytest.mark.parametrize(("as_shipped", "total"), [(False, 1.0), (True, 0.91)])
def test_weights_sum_to_what_each_form_says(as_shipped, total):
    """X4. Catches noise on the target, and a mass of e for e^2 or the other way round."""
    with jax.enable_x64():
        found = np.asarray(noising.targets(KEY, IDS, 7, 0.1, as_shipped))
    np.testing.assert_allclose(found.sum(-1), total, atol=1e-12)
    kept = np.take_along_axis(found, np.asarray(IDS)[..., None], -1)
    np.testing.assert_allclose(kept, 0.9, atol=1e-12)
    assert found.min() > 0


def test_without_noise_it_is_cross_entropy():
    """Catches a softmax over another axis, and a lost sign."""
    logits = jax.random.normal(KEY, (2, 2, 7))
    nats = noising.cross_entropy(logits, noising.targets(KEY, IDS, 7, 0.0))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), IDS[..., None], -1)
    np.testing.assert_allclose(nats, -picked[..., 0], rtol=1e-6)
