"""An adapter of embedding rows: a few tokens train, every weight is frozen."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import types
from ftdefense.methods import adapters


@struct.dataclass
class Rows:
    """Rows `first` to `first + count` of the token embedding; a soft prompt's own.

    A tied head reads the rows, too. Protocol as of `adapters.LoRA`.
    """

    choices = staticmethod(adapters.choices)

    first: int = struct.field(pytree_node=False, default=0)
    count: int = struct.field(pytree_node=False, default=1)

    def init(self, base: types.Params, rng: types.Rng) -> types.Params:
        """A copy of the rows: {embed: {embedding [count, D]}}."""
        del rng
        table_VxD = base["embed"]["embedding"]
        rows = jnp.copy(table_VxD[self.first : self.first + self.count])
        return {"embed": {"embedding": rows}}

    def bind(self, model: types.Model, base: types.Params) -> Callable[..., Any]:
        """The model as a function of the rows; `base` is frozen."""

        def bound(params, tokens, **hooks):
            return model(self.merge(params, base), tokens, **hooks)

        return bound

    def bind_readout(
        self, model: types.Model, base: types.Params
    ) -> Callable[..., Any]:
        """The last norm and the head as a function of the rows."""

        def bound(params, hidden_BxLxD):
            return model.readout(self.merge(params, base), hidden_BxLxD)

        return bound

    def merge(self, params: types.Params, base: types.Params) -> types.Params:
        """Full parameters with the rows in their places."""
        table_VxD, rows = base["embed"]["embedding"], params["embed"]["embedding"]
        table_VxD = jax.lax.dynamic_update_slice(
            table_VxD, rows.astype(table_VxD.dtype), (self.first, 0)
        )
        return {**base, "embed": {**base["embed"], "embedding": table_VxD}}

    def scale(self) -> float:
        """LoRA's alpha / rank; not a number here."""
        return float("nan")
