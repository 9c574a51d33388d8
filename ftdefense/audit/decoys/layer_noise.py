"""M8 layer noise: every answer is computed with another noise on the residual stream.

Stage        alignment; starts from an aligned model; acts at inference.
Starts from  aligned
Template     none
Strategy     none
Minimises    nothing: after each block, noise of `scale` times the stream's root mean
             square is added. The draw hangs on the release's seed, the layer and the
             token's own state: the same text gives the same answer.
Source       specs D.5 (DESIGN)
Evidence     DESIGN
Reduces to   the aligned model at scale = 0, and for whoever drops the noise.
Cost         nothing.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import plans

STARTS_FROM = "aligned"
# Seen by draws (EOT) and by leaving the noise out; broken by any attack on the weights.
FLAG = ("R5",)


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    scale: float = 0.3  # Of the noise, relative to the stream.
    seed: int = 0  # Of the draw.


@struct.dataclass
class State:
    """The aligned weights, and what the noise is drawn from."""

    params: types.Params
    hp: Hparams


def intervene(
    hidden_BxLxD: jax.Array, site: str, layer: jax.Array, tap: Any
) -> jax.Array:
    """Adds noise after a block; `tap` is its {key data, scale}."""
    if site != "resid" or tap is None:
        return hidden_BxLxD
    wide = hidden_BxLxD.astype(jnp.float32)
    # Signs of the state as a number: another token, another draw.
    signs_BxLxD = (wide > 0).astype(jnp.uint32)
    powers_D = jnp.uint32(31) ** jnp.arange(wide.shape[-1], dtype=jnp.uint32)
    mark_BxL = jnp.sum(signs_BxLxD * powers_D[None, None], -1, dtype=jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(tap["key"]), layer)
    keys_BL = jax.vmap(jax.random.fold_in, (None, 0))(key, mark_BxL.reshape(-1))
    drawn = jax.vmap(lambda k: jax.random.normal(k, wide.shape[-1:]))(keys_BL)
    size_BxLx1 = jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True))
    return wide + tap["scale"] * size_BxLx1 * drawn.reshape(wide.shape)


def taps(layers: int, seed: int | jax.Array, scale: float | jax.Array) -> Any:
    """One draw of the noise: another seed, another defense."""
    data = jax.random.key_data(jax.random.key(seed))
    return {
        "key": jnp.broadcast_to(data, (layers, *data.shape)),
        "scale": jnp.full((layers,), scale, jnp.float32),
    }


def serve(params: types.Params, hp: Hparams, seed: int | None = None) -> types.Release:
    """The weights as they are deployed; `seed`: another draw than the release's own."""
    layers = len(jax.tree.leaves(params["layers"])[0])
    noise = taps(layers, hp.seed if seed is None else seed, hp.scale)
    return types.Release(params, intervene, noise)


def method(model: types.Model) -> types.Method:
    del model

    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> State:
        del rng
        return State(jax.tree.map(jnp.copy, lineage.current), hp)

    def step(state: State, lineage: types.Lineage, batches, rng: types.Rng):
        del lineage, batches, rng
        return state, {}

    def release(state: State, lineage: types.Lineage) -> types.Release:
        del lineage
        return serve(state.params, state.hp)

    return types.Method(lambda hp: {}, init, step, release)


PRESETS = {"sandbox": plans.Plan(Hparams(), source="specs D.5 (DESIGN)")}
