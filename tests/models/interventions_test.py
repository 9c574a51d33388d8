"""Hooks and taps: where they act, and what their gradients cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.models import transformer
from ftdefense.objectives import losses

from .decoder import CONFIG
from .decoder import MODEL
from .decoder import SITES
from .decoder import add_tap
from .decoder import forward
from .decoder import params
from .decoder import tokens


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
