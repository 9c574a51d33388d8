"""Weight noise: a random kick of every matrix, relative to its size.

Threat       open_weight; knows nothing.
Minimises    nothing: W + sigma ||W||_F / sqrt(numel) N(0, 1), layer by layer, for every
             matrix and embedding; norm scales and biases stay.
Source       specs/attacks.md B.13 and B.21.
Evidence     DESIGN: sigma in .005, .01, .02, .05.
Reduces to   the release at sigma = 0, exactly.
Cost         0 forwards, 0 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import draws
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    sigma: float = 0.02  # Of the noise, relative to the root mean square of a matrix.


def noisy(params: types.Params, sigma, rng: types.Rng) -> types.Params:
    rngs = optax.tree.split_key_like(rng, params)

    def leaf(path, x, matrix, rng):
        if not matrix:
            return jnp.copy(x)
        axes = tuple(range(1 if "layers" in tree.path_names(path) else 0, x.ndim))
        square = jnp.mean(jnp.square(tree.wide(x)), axes, keepdims=True)
        noise = draws.normal(rng, x.shape, square.dtype)
        return tree.add_scale(x, sigma, jnp.sqrt(square) * noise)

    kicked = optimizers.matrices(params)
    return jax.tree_util.tree_map_with_path(leaf, params, kicked, rngs)


def method(model: types.Model) -> types.Method:
    del model
    still = lift.weight_edit(lambda lineage, hp: lineage.current)

    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> lift.EditState:
        return lift.EditState(noisy(lineage.current, hp.sigma, rng), hp)

    return still._replace(init=init)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(), source="DESIGN: specs/attacks.md B.13; sweep sigma in .005 to .05"
    ),
}
