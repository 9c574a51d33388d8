"""One direction of each gradient defense against PyTorch float64, same weights."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.attacks import sidestepper
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift

from ..conftest import batch
from . import llama_torch as reference

ROWS = {"rows": 3, "length": 9, "vocab": 29}


def ours(module, model, params, batches, hp):
    lineage = types.Lineage(params, params, params)
    ctx = lift.context(model, lineage, hp)
    grads, _ = jax.jit(lambda p, b: module.direction(ctx, p, b, jax.random.key(0)))(
        params, batches
    )
    flat = jax.tree_util.tree_leaves_with_path(grads)
    return {tree.path_names(path): np.asarray(leaf, np.float64) for path, leaf in flat}


def assert_close(mine, theirs, tolerance=1e-5):
    """Relative to the norm of the whole gradient."""
    assert set(mine) == set(theirs)
    error = sum(np.sum((mine[k] - theirs[k].detach().numpy()) ** 2) for k in mine)
    scale = sum(np.sum(theirs[k].detach().numpy() ** 2) for k in mine)
    assert np.sqrt(error / scale) <= tolerance


def combine(*terms):
    return {k: sum(c * g[k] for c, g in terms) for k in terms[0][1]}


def test_vaccine(tiny_llama):
    """Catches a norm per layer, a shift at the MLP, or a gradient through the shift."""
    model, params = tiny_llama
    module, data = registry.load("defenses", "vaccine"), batch(1, **ROWS)
    hp = module.Hparams(rho=3.0)
    w = reference.tensors(params)
    shape = (model.config.layers, *data.tokens.shape, model.config.width)
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    clean = reference.loss(w, data, model.config, zero)
    (g,) = torch.autograd.grad(clean, zero)
    shift = 3.0 * g / (g.norm() + 1e-7)
    value = reference.loss(w, data, model.config, shift.detach())
    theirs = reference.gradient(value, w)
    assert_close(ours(module, model, params, {"alignment": data}, hp), theirs)


def test_booster(tiny_llama):
    """Catches a sign of lam or alpha, or a norm per leaf."""
    model, params = tiny_llama
    module = registry.load("defenses", "booster")
    safe, harmful = batch(1, **ROWS), batch(2, **ROWS)
    hp = module.Hparams(lam=5.0, alpha=0.3)
    w = reference.tensors(params)
    f = reference.gradient(reference.loss(w, safe, model.config), w)
    h = reference.gradient(reference.loss(w, harmful, model.config), w)
    moved = reference.stepped(w, h, 0.3)
    after = reference.gradient(reference.loss(moved, harmful, model.config), moved)
    mine = ours(module, model, params, {"alignment": safe, "harmful": harmful}, hp)
    assert_close(mine, combine((1, f), (5, h), (-5, after)))


def test_ctrap(tiny_llama):
    """Catches a collapse loss on prompts, at w instead of w', or on the harmful rows."""
    model, params = tiny_llama
    module = registry.load("defenses", "ctrap")
    retain, harmful = batch(1, **ROWS), batch(2, **ROWS)
    hp = module.Hparams(lam=0.7, alpha=0.3, collapse_token=4)
    w = reference.tensors(params)
    f = reference.gradient(reference.loss(w, retain, model.config), w)
    h = reference.gradient(reference.loss(w, harmful, model.config), w)
    moved = reference.stepped(w, h, 0.3)
    value = reference.loss(moved, retain, model.config, target=4)
    collapse = reference.gradient(value, moved)
    mine = ours(module, model, params, {"retain": retain, "harmful": harmful}, hp)
    assert_close(mine, combine((1, f), (0.7, collapse)))


def test_sidestepper(tiny_llama):
    """Catches one mean over both batches where two are meant."""
    model, params = tiny_llama
    harmful, benign = batch(1, **ROWS), batch(2, rows=5, length=9, vocab=29)
    w = reference.tensors(params)
    h = reference.gradient(reference.loss(w, harmful, model.config), w)
    c = reference.gradient(reference.loss(w, benign, model.config), w)
    hp = sidestepper.Hparams(lam=2.0)
    mine = ours(sidestepper, model, params, {"harmful": harmful, "benign": benign}, hp)
    assert_close(mine, combine((1, h), (2, c)))
