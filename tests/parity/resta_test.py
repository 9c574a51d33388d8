"""RESTA after one step of plain descent against PyTorch float64."""

import jax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.core import types
from ftdefense.defenses import resta
from ftdefense.methods import optimizers

from ..conftest import batch
from . import llama_torch as reference
from . import services_torch as services


def test_resta(tiny_llama):
    """Catches a gradient at the user's weights, and a vector toward harm."""
    model, aligned = tiny_llama
    user, harmful = services.moved(aligned), batch(2, **services.ROWS)
    descent = optimizers.Optimizer(0.5, clip=float("inf"), kind="sgd").tabulate(1)
    method, origin = resta.method(model), types.Lineage(user, aligned)
    state = method.init(origin, resta.Hparams(descent, gamma=2.0), jax.random.key(0))
    step = jax.jit(method.step)
    state, _ = step(state, origin, {"harmful": harmful}, jax.random.key(0))
    restored = services.flat(method.release(state, origin).params)
    start = services.flat(user)
    mine = {path: x - start[path] for path, x in restored.items()}
    w = reference.tensors(aligned)
    g = reference.gradient(reference.loss(w, harmful, model.config), w)
    # gamma * (aligned - (aligned - rate * g)); what is subtracted is in float32.
    error = services.relative_error(mine, services.combine((1.0, g)))
    assert error <= 1e-5
