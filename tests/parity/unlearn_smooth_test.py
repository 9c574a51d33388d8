"""Unlearn-Smooth against PyTorch float64: both bases, every smoothing of a step.

The penalties are differentiated here by a second backward pass through the first.
"""

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.defenses import unlearn_smooth

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services

DATA = {"harmful": batch(1, **services.ROWS), "benign": batch(2, **services.ROWS)}


def mapped(params, move):
    """New leaves `move(path, leaf)`, without a history."""

    def build(node, path=()):
        if isinstance(node, dict):
            return {name: build(sub, (*path, name)) for name, sub in node.items()}
        return move(path, node.detach()).requires_grad_(True)

    return build(params)


def bent(value, w):
    """Gradients that may be differentiated again, and their global norm."""
    paths, leaves = zip(*reference.leaves(w), strict=True)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    return dict(zip(paths, grads, strict=True))


def norm(grads):
    return torch.sqrt(sum((g * g).sum() for g in grads.values()))


def draws_of(params, count):
    """The noise that the direction draws from the key 0."""
    keys = jax.random.split(jax.random.split(jax.random.key(0), 3)[2], count)
    for key in keys:
        noise = optax.tree.random_like(key, params, jax.random.normal, np.float32)
        leaves = jax.tree_util.tree_leaves_with_path(noise)
        yield {
            tree.path_names(path): torch.tensor(np.asarray(x, np.float64))
            for path, x in leaves
        }


def smoothed(forget, w, params, hp):
    """Gradient of the smoothed forget term."""
    g = reference.gradient(forget(w), w)
    if hp.smooth == "sam":
        uphill = reference.stepped(w, g, -hp.rho)
        return reference.gradient(forget(uphill), uphill)
    if hp.smooth == "rs":
        found = []
        for noise in draws_of(params, hp.draws):
            noisy = mapped(w, lambda path, x, e=noise: x + hp.sigma * e[path])
            gradient = reference.gradient(forget(noisy), noisy)
            found.append((1 / hp.draws, gradient))
        return services.combine(*found)
    if hp.smooth == "gp":
        value = forget(w)
        return reference.gradient(value + hp.rho * norm(bent(value, w)), w)
    if hp.smooth == "cr":
        unit = {path: x / (norm(g) + 1e-7) for path, x in g.items()}

        def added(node, path=()):
            if isinstance(node, dict):
                return {name: added(sub, (*path, name)) for name, sub in node.items()}
            return node + hp.mu * unit[path]

        # The shift is a constant: what moves with w is the point, so both gradients do.
        near, far = bent(forget(w), w), bent(forget(shifted := added(w)), shifted)
        change = norm({path: far[path] - x for path, x in near.items()})
        return reference.gradient(forget(w) + hp.rho * change, w)
    return g


@pytest.mark.parametrize(
    ("base", "smooth"),
    [
        ("npo", "none"),
        ("graddiff", "none"),
        ("npo", "sam"),
        ("graddiff", "sam"),
        ("npo", "rs"),
        ("npo", "gp"),
        ("npo", "cr"),
    ],
)
def test_direction(tiny_llama, base, smooth):
    """Catches a slope of NPO by rows, descent on the forget loss, a moved retain term,

    a norm by leaf or squared, and a penalty without its second derivative.
    """
    model, start = tiny_llama
    params = services.moved(start)
    hp = unlearn_smooth.Hparams(
        beta=0.8, gamma=1.3, rho=0.3, sigma=0.05, mu=0.5, base=base, smooth=smooth
    )
    mine, _ = services.direction(
        unlearn_smooth, model, params, DATA, hp, start=start, memory=()
    )
    frozen = reference.tensors(start)
    known = reference.loss(frozen, DATA["harmful"], model.config).detach()

    def forget(w):
        nats = reference.loss(w, DATA["harmful"], model.config)
        if base == "graddiff":
            return -nats
        return -2 / 0.8 * torch.nn.functional.logsigmoid(0.8 * (nats - known))

    w = reference.tensors(params)
    retain = reference.gradient(reference.loss(w, DATA["benign"], model.config), w)
    theirs = services.combine((1, smoothed(forget, w, params, hp)), (1.3, retain))
    assert services.relative_error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("smooth", ["gp", "cr"])
def test_as_shipped(tiny_llama, smooth):
    """Without its gradient the penalty of gp is nothing; cr doubles the forget term."""
    model, params = tiny_llama
    hp = unlearn_smooth.Hparams(gamma=0.0, rho=10.0, smooth=smooth, shipped=True)
    mine, _ = services.direction(unlearn_smooth, model, params, DATA, hp, memory=())
    w = reference.tensors(params)
    g = reference.gradient(-reference.loss(w, DATA["harmful"], model.config), w)
    factor = 2 if smooth == "cr" else 1  # At the reference NPO's slope is -1.
    assert services.relative_error(mine, services.combine((factor, g))) <= 1e-5
