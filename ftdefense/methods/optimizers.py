"""What lies below `direction`: clip, precondition, weight decay, learning rate."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.methods import freezing
from ftdefense.methods import preconditioners
from ftdefense.methods import schedules

KINDS = tuple(preconditioners.KINDS)
AVERAGING = ("adamw_sf", "adamw_sf_12")  # Schedule-free ones.


@struct.dataclass
class Optimizer:
    """An optax chain whose numbers are traced. Defaults are PyTorch's AdamW.

    Order, as in transformers' Trainer: clip the whole gradient, precondition, add
    decoupled weight decay, scale by the learning rate. Adam, Adagrad, Adadelta, RMSprop
    and SGD add the decay before they precondition. `of_kind` knows the usual numbers of
    each kind.
    """

    learning_rate: float = 1e-4  # Peak.
    schedule: Any = schedules.Schedule()  # A table [T + 1] once `init` has run.
    clip: float = 1.0  # L2 norm over all leaves above which gradients are scaled.
    weight_decay: float = 0.0  # On matrices only, unless `decay_all`.
    b1: float = 0.9  # Of `adamw_sf`: how near gradients are taken to the average.
    b2: float = 0.999  # Of `adadelta`: its rho; of `rmsprop`: its alpha.
    eps: float = 1e-8
    momentum: float = 0.0  # Of `sgd`, `nsgd`, `sign` and `muon`.
    # `adamw_by_leaf` counts the steps of each layer's leaf, as PyTorch does: one that
    # is frozen for a while is passed over entirely. It takes `active` (see `freeze`).
    # `adamw_sf` is schedule-free, as `schedulefree` >= 1.3, `adamw_sf_12` as its 1.2:
    # there Adam's second bias correction is a factor of the rate, and so of the average's
    # weights. `nsgd` and `sign` normalise the momentum.
    kind: str = struct.field(pytree_node=False, default="adamw")
    nesterov: bool = struct.field(pytree_node=False, default=False)  # The momentum.
    # On norm scales and biases too, as torch.optim given all parameters in one group.
    decay_all: bool = struct.field(pytree_node=False, default=False)
    # Whether `AVERAGING` kinds release their average x, or y, where gradients are taken.
    averaged: bool = struct.field(pytree_node=False, default=True)

    def tabulate(self, steps: int) -> "Optimizer":
        """Replaces the schedule by its values, so that `step` sees only an array."""
        return self.replace(schedule=self.schedule.table(steps))

    def turned(self, kind: str) -> "Optimizer":
        """Another kind, with the usual numbers of it where they are not AdamW's."""
        return self.replace(kind=kind, **preconditioners.NUMBERS.get(kind, {}))

    @property
    def steps(self) -> int:
        """Steps of the tabulated schedule; 0 before `tabulate`."""
        table = self.schedule
        return 0 if isinstance(table, schedules.Schedule) else table.shape[-1] - 1

    def transform(self) -> optax.GradientTransformation:
        """The chain; rebuilt at every trace, which is what lets its numbers vary.

        Raises:
          UserError: if there is no such kind.
        """
        if self.kind not in KINDS:
            raise errors.unknown("optimizer.kind", self.kind, KINDS)

        def rate(t):
            base = self.learning_rate * self.schedule[t]
            if self.kind == "adamw_sf_12":
                return base * jnp.sqrt(1 - self.b2 ** (t + 1))
            return base

        precondition = preconditioners.KINDS[self.kind](self)
        mask = None if self.decay_all else matrices
        decay = optax.add_decayed_weights(self.weight_decay, mask)
        descend = optax.scale_by_schedule(lambda t: -rate(t))
        if self.kind in AVERAGING:
            inner = optax.chain(precondition, decay, descend)
            # It counts steps from 1, the table from 0.
            averaging = contrib.schedule_free(inner, lambda t: rate(t - 1), self.b1)
            return optax.chain(clip(self.clip), preconditioners.in_float32(averaging))
        if self.kind in preconditioners.COUPLED:
            decayed = preconditioners.keep_dtypes(decay)
            return optax.chain(clip(self.clip), decayed, precondition, descend)
        by_leaf = self.kind == "adamw_by_leaf"
        freeze = [freezing.freeze()] if by_leaf else []
        return optax.chain(
            *freeze,  # Before the norm is taken: what is frozen has no gradient.
            clip(self.clip),
            precondition,
            decay,
            descend,
            *freeze,
        )

    def released(self, params: Any, opt_state: Any) -> Any:
        """The weights that leave training: of `AVERAGING` the average, else `params`.

        `params` are the y that gradients are taken at: `averaged` = False leaves them.
        """
        if self.kind not in AVERAGING or not self.averaged:
            return params
        _, averaging = opt_state
        found = contrib.schedule_free_eval_params(averaging, tree.wide(params))
        return optax.tree.cast_like(found, params)


def of_kind(
    kind: str,
    learning_rate: float,
    schedule: schedules.Schedule = schedules.Schedule(),  # noqa: B008
    **fields: Any,
) -> Optimizer:
    """An optimizer with the usual numbers of its kind, and `fields` besides."""
    return Optimizer(learning_rate, schedule).turned(kind).replace(**fields)


# Of every preset for the sandbox, so that methods differ in nothing but their rule: to go
# on from an aligned model, to align, and to fine-tune, as an attacker or as a provider.
SANDBOX = Optimizer(3e-4, schedules.Schedule(0.1, 0.05, decay="cosine"))
SANDBOX_ALIGNMENT = SANDBOX.replace(weight_decay=0.5)  # From the pretrained model.
SANDBOX_TUNING = Optimizer(1e-4, schedules.Schedule(0.1, decay="cosine"))


def clip(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as PyTorch does.

    Unlike a `where` on the norm, it stays finite, and differentiable, at an infinite
    `max_norm`, which turns it off.
    """

    def update(updates, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return optax.stateless(update)


def matrices(params: Any) -> Any:
    """True for the leaves that weight decay applies to: not norm scales, not biases."""

    def decays(path, leaf):
        names = tree.path_names(path)
        return leaf.ndim > 1 and not (names and names[-1] in ("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)
