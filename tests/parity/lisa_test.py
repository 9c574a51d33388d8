"""Lisa's two states against PyTorch float64."""

import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import lisa

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


@pytest.mark.parametrize("aligning", [True, False])
def test_lisa(tiny_llama, aligning):
    """Catches an anchor or a batch of the wrong state, and a rho outside the penalty."""
    model, params = tiny_llama
    data = {
        "alignment": batch(1, **services.ROWS),
        "user": batch(2, **services.ROWS),
    }
    anchors = {"w_alignment": 6, "w_user": 7}
    anchors = {name: services.moved(params, seed) for name, seed in anchors.items()}
    memory = lisa.Memory(jnp.asarray(aligning), jnp.int32(1), **anchors)
    hp = lisa.Hparams(rho=0.3, free_ratio=0.0)
    mine, _ = services.direction(lisa, model, params, data, hp, memory=memory, step=1)
    w = reference.tensors(params)
    anchor = reference.tensors(anchors["w_user" if aligning else "w_alignment"])
    penalty = sum(
        ((x - y.detach()) ** 2).sum()
        for (_, x), (_, y) in zip(
            reference.leaves(w), reference.leaves(anchor), strict=True
        )
    )
    role = "alignment" if aligning else "user"
    value = reference.loss(w, data[role], model.config) + 0.15 * penalty
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
