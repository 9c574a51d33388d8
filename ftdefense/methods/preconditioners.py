"""What each kind of optimizer does to a clipped gradient, and its usual numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftdefense.core import tree
from ftdefense.methods import freezing
from ftdefense.methods import muon

Transform = optax.GradientTransformation


def adagrad(eps: Any) -> Transform:
    """g / (sqrt(sum of g^2) + eps), the sum from zero, as PyTorch's.

    That of optax starts at 0.1 and has eps under the root.
    """

    def update(updates, sums, params=None):
        del params
        sums = jax.tree.map(lambda g, s: s + jnp.square(g), updates, sums)
        found = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, sums)
        return found, sums

    return Transform(optax.tree.zeros_like, update)


def norms(x: Any) -> Any:
    """L2 norms tensor by tensor, [1, ...], or [N, 1, ...] of a stack, which is N."""

    def norm(path, leaf):
        axes = tuple(range(int("layers" in tree.path_names(path)), leaf.ndim))
        squares = jnp.square(tree.wide(leaf))
        return jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))

    return jax.tree_util.tree_map_with_path(norm, x)


def normalised(eps: Any) -> Transform:
    """g / (||g|| + eps), tensor by tensor."""

    def update(updates, params=None):
        del params
        return jax.tree.map(
            lambda g, norm: tree.wide(g) / (norm + eps), updates, norms(updates)
        )

    return optax.stateless(update)


def sign() -> Transform:
    """Signs of the entries; 0 of 0."""
    return optax.stateless(lambda updates, params=None: jax.tree.map(jnp.sign, updates))


def keep_dtypes(inner: Transform) -> Transform:
    """Rounds what `inner` returns to the dtypes it was given: numbers may be wider."""

    def update(updates, state, params=None):
        found, after = inner.update(updates, state, params)
        return optax.tree.cast_like(found, updates), optax.tree.cast_like(after, state)

    return Transform(inner.init, update)


def in_float32(inner: Transform) -> Transform:
    """Runs `inner` on wide copies: what it averages would be lost in bfloat16."""

    def update(updates, state, params=None):
        return inner.update(tree.wide(updates), state, tree.wide(params))

    return Transform(lambda params: inner.init(tree.wide(params)), update)


def _adam(o: Any) -> Transform:
    return optax.scale_by_adam(o.b1, o.b2, o.eps)


def _momentum(o: Any) -> Transform:
    return optax.trace(o.momentum, nesterov=o.nesterov)


# From the numbers of an `optimizers.Optimizer`.
KINDS: dict[str, Callable[[Any], Transform]] = {
    "adamw": _adam,
    "adamw_by_leaf": lambda o: freezing.scale_by_adam(o.b1, o.b2, o.eps),
    "adamw_sf": lambda o: optax.scale_by_rms(
        o.b2, o.eps, eps_in_sqrt=False, bias_correction=True
    ),
    "adamw_sf_12": lambda o: optax.scale_by_rms(
        o.b2, o.eps, eps_in_sqrt=False, bias_correction=False
    ),
    "adam": lambda o: keep_dtypes(_adam(o)),
    "adagrad": lambda o: keep_dtypes(adagrad(o.eps)),
    "adadelta": lambda o: keep_dtypes(optax.scale_by_adadelta(o.b2, o.eps)),
    "lion": lambda o: keep_dtypes(optax.scale_by_lion(o.b1, o.b2)),
    "muon": lambda o: keep_dtypes(
        muon.scale_by_muon(o.b1, o.b2, o.eps, o.momentum, nesterov=o.nesterov)
    ),
    "nsgd": lambda o: keep_dtypes(optax.chain(_momentum(o), normalised(o.eps))),
    "rmsprop": lambda o: keep_dtypes(
        optax.scale_by_rms(o.b2, o.eps, eps_in_sqrt=False, bias_correction=False)
    ),
    "sgd": _momentum,
    "sign": lambda o: keep_dtypes(optax.chain(_momentum(o), sign())),
}
# Their weight decay is L2, part of the gradient, as in PyTorch.
COUPLED = ("adam", "adagrad", "adadelta", "rmsprop", "sgd")
# Numbers of a kind where they are not AdamW's: PyTorch's, or the authors'.
NUMBERS = {
    "adagrad": {"eps": 1e-10},
    "adadelta": {"b2": 0.9, "eps": 1e-6},
    "lion": {"b2": 0.99},
    "muon": {"momentum": 0.95, "nesterov": True},
    "rmsprop": {"b2": 0.99},
    "sgd": {"momentum": 0.9},
}
