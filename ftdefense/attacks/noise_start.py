"""Noise start: step aside at random, then fine-tune on the user's rows.

Threat       open_weight; knows none of the defense's internals.
Minimises    L(user) from w + noise ||w|| u, with u a random direction of length one,
             tensor by tensor (layer by layer); norm scales and biases stay. Through
             LoRA the noise has its rank: B starts so that A B has that length.
Source       specs/attacks.md B.21, A.6 and D.3, R2; random starts are those of Madry et
             al. 2018, arXiv:1706.06083.
Evidence     DESIGN: noise in 1e-3, 3e-3, 1e-2, 3e-2.
Reduces to   SFT on user at noise = 0.
Cost         1 forward, 1 backward.
"""

from typing import Any

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
from ftdefense.methods import preconditioners


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    noise: float = 1e-2  # Length of the first step, relative to each tensor's norm.


def displaced(
    params: types.Params, base: types.Params, hp: Hparams, rng: types.Rng
) -> types.Params:
    """What trains, moved at random: W of `base` by `hp.noise` times its norm."""
    rngs = optax.tree.split_key_like(rng, params)

    def draw(path, x, matrix, rng):
        # Of two factors one moves: their product is linear in it.
        moves = matrix and tree.path_names(path)[-1] != "a"
        wide = jnp.promote_types(x.dtype, jnp.float32)
        drawn = draws.normal(rng, x.shape, wide)
        return drawn if moves else jnp.zeros_like(drawn)

    matrices = optimizers.matrices(params)
    drawn = jax.tree_util.tree_map_with_path(draw, params, matrices, rngs)
    trial = hp.adapter.merge(optax.tree.add(tree.wide(params), drawn), tree.wide(base))
    wanted = preconditioners.norms(base)
    moved = preconditioners.norms(optax.tree.sub(trial, tree.wide(base)))

    def chosen(norms):
        layers = getattr(hp.adapter, "layers", ())
        return norms[jnp.asarray(layers)] if layers else norms

    def move(path, x, noise):
        *module, name = tree.path_names(path)
        site = (*module, "kernel") if name == "b" else (*module, name)
        if name == "a":
            return x
        length = chosen(_at(moved, site))
        ratio = chosen(_at(wanted, site)) / jnp.where(length > 0, length, 1)
        return tree.add_scale(x, hp.noise * ratio, noise)

    return jax.tree_util.tree_map_with_path(move, params, drawn)


def _at(nested: Any, path: tuple[str, ...]) -> jax.Array:
    for name in path:
        nested = nested[name]
    return nested


def method(model: types.Model) -> types.Method:
    plain = lift.supervised(model, "user")

    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> lift.TrainState:
        params = hp.adapter.init(lineage.current, rng)
        rng = jax.random.fold_in(rng, 2)
        return lift.init_state(displaced(params, lineage.current, hp, rng), hp)

    return plain._replace(init=init)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: as sft; sweep noise in 1e-3 to 3e-2",
    ),
}
