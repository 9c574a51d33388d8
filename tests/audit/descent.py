"""Sweeps of the learning rate on toys that do not stop at an edge."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftdefense.audit.diagnostics import sweeps
from ftdefense.core import tree

# DESIGN, specs/attacks.md D.3.
LOWEST, HIGHEST, SPACING = 1e-6, 1e-3, math.sqrt(10)
EXTENSION = 10.0


def grid(low: float = LOWEST, high: float = HIGHEST) -> list[float]:
    """Log grid, about three a decade: spec's x3 spacing, closed at whole decades."""
    count = round(math.log(high / low) / math.log(SPACING))
    return [low * SPACING**i for i in range(count + 1)]


KINDS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": lambda rate: optax.sgd(rate),
    "adam": lambda rate: optax.adam(rate),
    # Each tensor by its own norm: invariant to the scale of the parametrisation.
    "normalised": lambda rate: optax.chain(
        optax.stateless(lambda g, _: jax.tree.map(tree.normalize, g)),
        optax.scale(-rate),
    ),
}


@functools.partial(jax.jit, static_argnames=("loss", "steps", "kind"))
def descend(
    loss: Callable[[Any], jax.Array],
    start: Any,
    rates: jax.Array,
    steps: int,
    kind="sgd",
) -> tuple[Any, jax.Array]:
    """Weights and losses after `steps` at each constant rate, all in one program."""

    def run(rate):
        transform = KINDS[kind](rate)

        def step(carry, _):
            weights, state = carry
            updates, state = transform.update(jax.grad(loss)(weights), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        (weights, _), _ = jax.lax.scan(
            step, (start, transform.init(start)), length=steps
        )
        return weights, loss(weights)

    return jax.vmap(run)(rates)


class Swept(NamedTuple):
    """The outcome of a sweep of constant rates."""

    rates: list[float]
    losses: list[float]
    edge: str  # At which the best still is: empty, or out of extensions.

    tie: float = 0.0  # Within which losses are equally good.

    @property
    def best(self) -> tuple[float, float]:
        """(rate, loss) of the smallest rate that is as good as any."""
        losses = [math.inf if math.isnan(x) else x for x in self.losses]
        i = next(i for i, x in enumerate(losses) if x <= min(losses) + self.tie)
        return self.rates[i], losses[i]


def sweep(
    loss: Callable[[Any], jax.Array],
    start: Any,
    steps: int,
    *,
    rates: Sequence[float] = (),
    kind: str = "sgd",
    extensions: int = 4,
    tie: float = 1e-6,
    enough: float = 1e-6,
) -> Swept:
    """Sweeps the rate of plain descent, tenfold further while the best is at an edge.

    `enough` is a loss at which nothing is left to gain.
    """
    known: dict[float, float] = {}
    wanted = list(rates) or grid()
    for _ in range(extensions + 1):
        table = jnp.asarray(wanted, float)
        _, losses = descend(loss, start, table, steps, kind)
        known |= dict(zip(wanted, np.asarray(losses, float).tolist(), strict=True))
        ordered = sorted(known)
        scores = [-known[rate] for rate in ordered]
        at = sweeps.edge(ordered, scores, tie=tie, enough=-enough)
        if not at:
            break
        low, high = ordered[0], ordered[-1]
        span = (high, high * EXTENSION) if at == "high" else (low / EXTENSION, low)
        wanted = [rate for rate in grid(*span) if not _near(rate, known)]
    return Swept(ordered, [known[rate] for rate in ordered], at, tie)


def _near(rate: float, known: Mapping[float, float]) -> bool:
    return any(math.isclose(rate, other, rel_tol=1e-6) for other in known)
