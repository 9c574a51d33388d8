"""An adapter of embedding rows: a few tokens train, every weight is frozen."""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import adapters


@struct.dataclass
class Rows(adapters.Merged):
    """Rows `first` to `first + count` of the token embedding; a soft prompt's own.

    A tied head reads the rows, too. Protocol as of `adapters.LoRA`.
    """

    first: int = struct.field(pytree_node=False, default=0)
    count: int = struct.field(pytree_node=False, default=1)

    def init(self, base: types.Params, rng: types.Rng) -> types.Params:
        """A copy of the rows: {embed: {embedding [count, D]}}."""
        del rng
        table_VxD = base["embed"]["embedding"]
        rows = jnp.copy(table_VxD[self.first : self.first + self.count])
        return {"embed": {"embedding": rows}}

    def merge(self, params: types.Params, base: types.Params) -> types.Params:
        """Full parameters with the rows in their places."""
        table_VxD, rows = base["embed"]["embedding"], params["embed"]["embedding"]
        table_VxD = jax.lax.dynamic_update_slice(
            table_VxD, rows.astype(table_VxD.dtype), (self.first, 0)
        )
        return {**base, "embed": {**base["embed"], "embedding": table_VxD}}
