"""What the defenses' tests share: the toy in float64, and gradients to compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.models import toy
from ftdefense.objectives import losses

MODEL = toy.Toy()
KEY = jax.random.key(0)


def params(seed: int = 3) -> types.Params:
    return jax.tree.map(lambda x: x, _params(seed))  # A tree of one's own.


@functools.cache
def _params(seed: int) -> types.Params:
    with jax.ensure_compile_time_eval():  # Numbers, also where a test is traced.
        return jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), MODEL.init(jax.random.key(seed))
        )


def lineage() -> types.Lineage:
    """Aligned weights a little away from the pretrained ones."""
    pretrained = params()
    aligned = tree.add_scale(pretrained, 0.3, params(9))
    return types.Lineage(aligned, aligned, pretrained)


def context(hp, step=0, steps: int = 0) -> types.Context:
    ctx = lift.context(MODEL, types.Lineage(params()), hp, step)
    return ctx._replace(steps=steps)


def directed(module, hp, data, *memory, step=0, steps=0, weights=None):
    """What `module.direction` returns at `weights`, compiled; numbers are traced."""
    weights = params() if weights is None else weights
    return _directed(module, hp, params(), weights, data, memory, step, steps)


@functools.partial(jax.jit, static_argnames=("module", "steps"))
def _directed(module, hp, base, weights, data, memory, step, steps):
    ctx = lift.context(MODEL, types.Lineage(base), hp, step)._replace(steps=steps)
    return module.direction(ctx, weights, data, KEY, *memory)


def sft_gradient(data: types.Batch, weights=None) -> types.Params:
    return _sft_gradient(params() if weights is None else weights, data)


_sft_gradient = jax.jit(jax.grad(losses.next_token(MODEL)))


def quadratic(w, center, rng=None):
    """Half the squared distance: its Hessian is the identity."""
    del rng
    return 0.5 * jnp.sum(jnp.square(w - center))


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def combine(*terms) -> types.Params:
    """Sum of factor * tree."""
    (factor, total), *rest = terms
    total = jax.tree.map(lambda x: factor * x, total)
    for factor, term in rest:
        total = tree.add_scale(total, factor, term)
    return total
