"""Muon's preconditioner: hidden matrices by orthogonalised momentum, the rest by Adam.

Source: Jordan et al. 2024, as optax.contrib has it: the momentum's bias is corrected
(PyTorch's is not), and a step has length sqrt(max(1, out / in)) in the spectral norm.
"""

from typing import Any

import jax
import optax
from optax import contrib

from ftdefense.core import tree

# Left to Adam by Muon's author, as are all vectors.
_OUTER = ("embedding", "lm_head")
# x W = y by the last two axes; what is stacked before them is one matrix each.
_MATRIX = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def scale_by_muon(
    b1: Any, b2: Any, eps: Any, momentum: Any, *, nesterov: bool
) -> optax.GradientTransformation:
    """`b1`, `b2` are Adam's; `momentum` is that of the matrices."""
    hidden = optax.chain(
        contrib.scale_by_muon(
            beta=momentum,
            eps=eps,
            nesterov=nesterov,
            weight_dimension_numbers=_matrices,
        ),
        _scale_by_width(),
    )
    return optax.partition(
        {"muon": hidden, "adam": optax.scale_by_adam(b1, b2, eps)}, _labels
    )


def _matrices(params):
    return jax.tree.map(lambda _: _MATRIX, params)


def _labels(params):
    def label(path, leaf):
        names = tree.path_names(path)
        least = 3 if "layers" in names else 2
        inner = leaf.ndim >= least and not set(names) & set(_OUTER)
        return "muon" if inner else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _scale_by_width() -> optax.GradientTransformation:
    """Scales an orthogonal [..., in, out] to the spectral norm of its step."""

    def scaled(x):
        width_in, width_out = x.shape[-2:]
        return x * max(1.0, width_out / width_in) ** 0.5

    return optax.stateless(lambda updates, params=None: jax.tree.map(scaled, updates))
