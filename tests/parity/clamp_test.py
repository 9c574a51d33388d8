"""CLAMP, differentiated through its attack, against PyTorch's double backward."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.defenses import clamp

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services

HP = clamp.Hparams(
    lam_long=1.3,
    lam_contraction=2.0,
    lam_curvature=0.6,
    lam_initial=0.4,
    eta=0.05,
    contraction=0.7,
    probe=0.5,
    reach=0.5,
    inner_steps=2,
)


def rebuilt(w, flat, path=()):
    """Nested like `w`, with the tensors of {path: tensor}."""
    if isinstance(w, dict):
        return {name: rebuilt(sub, flat, (*path, name)) for name, sub in w.items()}
    return flat[path]


def test_clamp(tiny_llama):
    """Catches a first-order step, a gradient through u, a norm per leaf."""
    model, params = tiny_llama
    data = {"retain": batch(1, **services.ROWS), "harmful": batch(2, **services.ROWS)}
    mine, _ = services.direction(clamp, model, params, data, HP)
    rng = jax.random.split(jax.random.key(0), 3)[2]
    v = jax.tree_util.tree_leaves_with_path(clamp.direction_of(rng, params))
    v = {tree.path_names(p): torch.tensor(np.asarray(x, np.float64)) for p, x in v}
    w = reference.tensors(params)
    start = dict(reference.leaves(w))

    def loss(flat):
        return reference.loss(rebuilt(w, flat), data["harmful"], model.config)

    def slope(flat, value):
        found = torch.autograd.grad(value, list(flat.values()), create_graph=True)
        return dict(zip(flat, found, strict=True))

    def plus(flat, scale, other):
        return {k: x + scale * other[k] for k, x in flat.items()}

    def length(flat):
        return torch.sqrt(sum((x * x).sum() for x in flat.values()))

    at, values, bends = start, [], []
    for _ in range(HP.inner_steps):
        values.append(loss(at))
        g = slope(at, values[-1])
        norm = length(g).detach()
        u = {k: x.detach() / (norm + 1e-7) for k, x in g.items()}
        ends = (loss(plus(at, d, u)) for d in (HP.reach, -HP.reach))
        bends.append((sum(ends) - 2 * values[-1]) / HP.reach**2)
        at = plus(at, -HP.eta, g)
    last = loss(at)
    g = slope(at, last)
    near = plus(at, HP.probe, v)
    difference = plus(slope(near, loss(near)), -1, g)
    c = length(plus(v, -HP.eta / HP.probe, difference))
    further = HP.eta * length(g) / (1 - c).clamp(min=HP.gap)
    tail = length(g) * further + HP.smoothness / 2 * further**2
    softplus = torch.nn.functional.softplus
    total = (
        reference.loss(w, data["retain"], model.config)
        + HP.lam_long * (values[0] - last + tail - HP.margin).clamp(min=0)
        + HP.lam_contraction * softplus(c - HP.contraction)
        + HP.lam_curvature * sum(softplus(HP.curvature - k) for k in bends)
        - HP.lam_initial * values[0]
    )
    theirs = reference.gradient(total, w)
    assert services.relative_error(mine, theirs) <= 1e-5
