"""LoRA: what trains, how much of it, and that merging changes nothing (B.6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import noise_start
from ftdefense.attacks import sft
from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.objectives import losses
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
NARROW = adapters.LoRA(alpha=6.0, rank=3, targets=("up", "down"))
VARIANTS = {
    "all": NARROW,
    "first": NARROW.replace(layers=(0,)),
    "last": NARROW.replace(layers=(1,)),
    "stabilised": NARROW.replace(rank_stabilised=True),
}
everyone = pytest.mark.parametrize("adapter", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def base():
    return jax.tree.map(lambda x: x.astype(jnp.float64), MODEL.init(jax.random.key(0)))


def trained(adapter):
    """Factors that are nowhere zero."""
    factors = adapter.init(base(), jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.3, factors)


@everyone
def test_counts_of_what_trains(adapter):
    """B.6: sum of r (d_in + d_out). Catches factors of layers that do not train."""
    layers = len(adapter.layers) or toy.LAYERS
    factors = adapter.init(base(), jax.random.key(1))
    assert tree.size(factors) == layers * 2 * adapter.rank * (8 + 8)


@everyone
def test_starts_at_the_base_and_merges(adapter):
    """Catches a scale that is missing from, or twice in, one of the two paths."""
    tokens, start = batch(0).tokens, base()
    factors = adapter.init(start, jax.random.key(1))
    bound = adapter.bind(MODEL, start)
    plain = MODEL(start, tokens).logits
    np.testing.assert_array_equal(bound(factors, tokens).logits, plain)
    merged = MODEL(adapter.merge(trained(adapter), start), tokens).logits
    unmerged = bound(trained(adapter), tokens).logits
    # The product is formed in float32.
    np.testing.assert_allclose(merged, unmerged, rtol=1e-5, atol=1e-5)
    assert not np.allclose(merged, plain, rtol=1e-2)


def test_stabilised_scale():
    """alpha / sqrt(rank). Catches a scale that the merge alone has."""
    plain = NARROW.replace(alpha=6.0 * 3**0.5)
    stabilised = VARIANTS["stabilised"]
    assert float(stabilised.scale()) == pytest.approx(6.0 / 3**0.5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        stabilised.merge(trained(stabilised), base()),
        plain.merge(trained(plain), base()),
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_other_layers_stay(layer):
    """Catches factors that land in layer 0 whatever the name."""
    adapter = NARROW.replace(layers=(layer,))
    start = base()
    merged = adapter.merge(trained(adapter), start)
    kernels = merged["layers"]["mix"], start["layers"]["mix"]
    for name in ("up", "down"):
        after, before = (k[name]["kernel"] for k in kernels)
        np.testing.assert_array_equal(after[1 - layer], before[1 - layer])
        assert np.all(after[layer] != before[layer])
    np.testing.assert_array_equal(
        merged["lm_head"]["kernel"], start["lm_head"]["kernel"]
    )


def test_the_order_of_layers_is_kept():
    """Catches layers that are sorted on one of the two paths."""
    adapter, start = NARROW.replace(layers=(1, 0)), base()
    turned = jax.tree.map(lambda x: x[::-1], trained(adapter))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        adapter.merge(turned, start),
        NARROW.merge(trained(adapter), start),
    )


def test_a_factored_kernel_starts_as_itself_and_merges():
    """W = I W, then A B. Catches B A, a target that is left out, and a frozen factor."""
    adapter, start, data = adapters.Factored(("up", "down")), base(), batch(0)
    factors = adapter.init(start, jax.random.key(1))
    assert tree.size(factors) == toy.LAYERS * 2 * (8 * 8 + 8 * 8)
    bound = adapter.bind(MODEL, start)
    plain = MODEL(start, data.tokens).logits
    np.testing.assert_allclose(bound(factors, data.tokens).logits, plain, rtol=1e-12)
    inside = jax.jit(jax.grad(losses.next_token(bound)))(factors, data)
    assert all(np.any(g != 0) for g in jax.tree.leaves(inside))
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, factors, inside)
    merged = adapter.merge(moved, start)
    up = moved["layers"]["mix"]["up"]
    for layer in range(toy.LAYERS):
        np.testing.assert_allclose(
            merged["layers"]["mix"]["up"]["kernel"][layer],
            np.asarray(up["a"][layer]) @ np.asarray(up["b"][layer]),
            rtol=1e-12,
        )
    np.testing.assert_array_equal(
        merged["lm_head"]["kernel"], start["lm_head"]["kernel"]
    )


def test_no_gradient_outside():
    """Catches a base that trains, and factors of zero that stand in for the others."""
    adapter, start, data = VARIANTS["last"], base(), batch(0)

    def loss(factors, start):
        return losses.next_token(adapter.bind(MODEL, start))(factors, data)

    factors = trained(adapter)
    inside = jax.jit(jax.grad(loss))(factors, start)
    assert all(np.all(g != 0) for g in jax.tree.leaves(inside))
    state = loop.init(
        sft.method(MODEL),
        types.Lineage(start),
        sft.Hparams(optimizers.Optimizer(1e-2), adapter),
        jax.random.key(0),
        1,
    )
    shapes = jax.tree.map(jnp.shape, state.params)
    assert shapes == jax.tree.map(jnp.shape, factors)


@pytest.mark.parametrize("layers", [(2,), (-1,), (0, 0)])
def test_layers_are_checked(layers):
    """Catches an index that JAX clips to the last layer."""
    with pytest.raises(errors.UserError, match="layers 0 to 1"):
        NARROW.replace(layers=layers).init(base(), jax.random.key(0))


def test_noise_through_a_part_of_the_layers():
    """Catches norms of layer 0 for those of the layer that moves."""
    adapter, start = VARIANTS["last"], base()
    hp = noise_start.Hparams(adapter=adapter, noise=0.03)
    factors = adapter.init(start, jax.random.key(1))
    moved = noise_start.displaced(factors, start, hp, jax.random.key(2))
    after = adapter.merge(moved, start)["layers"]["mix"]["up"]["kernel"][1]
    before = start["layers"]["mix"]["up"]["kernel"][1]
    length = np.linalg.norm(after - before) / np.linalg.norm(before)
    np.testing.assert_allclose(length, 0.03, rtol=1e-5)
