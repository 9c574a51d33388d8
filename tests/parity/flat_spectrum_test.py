"""The spectrum of a Llama's adapter against PyTorch float64."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.methods import adapters
from ftdefense.objectives import spectra

from . import services_torch as services


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_flat_spectrum(tiny_llama):
    """Catches norms of the stacked product, and a sum over kernels."""
    _, params = tiny_llama
    adapter = adapters.LoRA(alpha=4.0, rank=3)
    factors = services.moved(adapter.init(params, jax.random.key(0)), scale=0.3)
    factors = jax.tree.map(lambda x: x.astype("float64"), factors)
    mine = jax.jit(jax.value_and_grad(spectra.mean_concentration))(factors)
    leaves = {
        tree.path_names(path): torch.tensor(np.asarray(x), requires_grad=True)
        for path, x in jax.tree_util.tree_leaves_with_path(factors)
    }
    ratios = []
    for path, a in leaves.items():
        if path[-1] == "a":
            for product in a @ leaves[*path[:-1], "b"]:
                nuclear = torch.linalg.matrix_norm(product, ord="nuc")
                ratios.append(product.norm() / nuclear - 3**-0.5)
    value = sum(ratios) / len(ratios)
    value.backward()
    np.testing.assert_allclose(mine[0], value.item(), rtol=1e-9)
    for path, x in jax.tree_util.tree_leaves_with_path(mine[1]):
        theirs = leaves[tree.path_names(path)].grad.numpy()
        assert np.linalg.norm(x - theirs) <= 1e-5 * np.linalg.norm(theirs)
