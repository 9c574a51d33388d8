"""Learning-rate schedules as arrays: every number in them is traced."""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors

DECAYS = ("constant", "linear", "cosine", "restarts")
# Ratios of steps are counted in float32: 0.1 * 30 must not round up to 4 steps.
_ROUNDING = 1e-4


@struct.dataclass
class Schedule:
    """Multiples of the peak learning rate: kick, then warm-up, then decay.

    With T steps, K = floor(kick_ratio * T) and W = ceil(warmup_ratio * T):
    `kick` for t < K, a line from 0 to 1 over the next W steps, then `decay` from 1 to
    `floor` at t = T. Warm-up and decay count as in transformers' schedules; `early`
    warms up from 1 / W, so that W steps reach the peak at the last of them; the kick is
    Kick-Settle's (arXiv 2605.14605, App. H). A `period` gives the decay a length of its
    own, counted from the end of the warm-up; `restarts` (SGDR, arXiv 1608.03983) is the
    cosine once a period, without further warm-ups. All numbers may be traced.
    """

    warmup_ratio: float = 0.0  # Share of the steps.
    floor: float = 0.0  # Value at the last step, relative to the peak.
    kick_ratio: float = 0.0  # Share of the steps; rho in the paper.
    kick: float = 1.0  # Value during the kick, relative to the peak.
    period: float = 0.0  # Length of the decay, in multiples of T; 0: until t = T.
    decay: str = struct.field(pytree_node=False, default="constant")
    early: bool = struct.field(pytree_node=False, default=False)

    def table(self, steps: int) -> jax.Array:
        """Values at t = 0 .. steps, float [steps + 1]; step t uses the entry t.

        Raises:
          UserError: if there is no such decay.
        """
        if self.decay not in DECAYS:
            raise errors.unknown("schedule.decay", self.decay, DECAYS)
        t = jnp.arange(steps + 1.0)
        kicked = jnp.floor(self.kick_ratio * steps + _ROUNDING)
        warmup = jnp.ceil(self.warmup_ratio * steps - _ROUNDING)
        start = kicked + warmup
        rising = (t - kicked + self.early) / jnp.maximum(warmup, 1)
        value = jnp.where(t < start, rising, self._settled(t - start, steps - start))
        return jnp.where(t < kicked, self.kick, value)

    def _settled(self, elapsed: jax.Array, left: jax.Array) -> jax.Array:
        """The decay, `elapsed` steps after its begin; `left` are those until t = T."""
        if self.decay == "constant":  # At its peak: the floor is where a decay ends.
            return jnp.ones_like(elapsed)
        period = jnp.round(self.period * (elapsed.size - 1))
        length = jnp.maximum(jnp.where(period > 0, period, left), 1)
        if self.decay == "restarts":
            elapsed = jnp.mod(elapsed, length)
        progress = jnp.clip(elapsed / length, 0, 1)
        linear = self.decay == "linear"
        shape = 1 - progress if linear else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return self.floor + (1 - self.floor) * shape
