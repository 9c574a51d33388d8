"""Prune: zero the weights that refusing rests on and usefulness does not.

Threat       open_weight; knows harmful prompts and benign pairs. The refusals are the
             release's own answers.
Minimises    nothing: of each matrix, the entries among the highest share q of scores on
             refusals and not among the highest share p on benign answers become 0.
             Scores: `snip` |W| sum_x |dL(x)/dW|, `wanda` |W| ||X_j||_2 of its inputs at
             answer positions.
Source       Wei et al. 2024, arXiv:2402.05162.
Evidence     CODE for the scores, the set difference per matrix and the grid .01 to .1 of
             p and q; which cell of it breaks a model is second-hand (3 % of weights).
Differs      the safety set is what the release says to the attacker's harmful prompts,
             whatever it says (DESIGN): the paper's are judged refusals.
Reduces to   the release at q = 0 or p = 1, exactly.
Cost         2 forwards, 2 backwards with snip, row by row; 2 forwards with wanda.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import attribution
from ftdefense.methods import costs
from ftdefense.methods import edits
from ftdefense.methods import plans
from ftdefense.objectives import losses

SCORES = ("snip", "wanda")
ROLES = ("behaviour", "benign")
SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    q: float = 0.05  # Share of entries that count as safety's.
    p: float = 0.05  # Share that count as utility's, and are spared.
    score: str = struct.field(pytree_node=False, default="snip")
    targets: tuple[str, ...] = struct.field(
        pytree_node=False, default=adapters.PROJECTIONS
    )

    @property
    def passes(self) -> float:
        """Over both roles; Wanda reads, and differentiates nothing (see Cost)."""
        return costs.passes(forwards=2, backwards=2 if self.score == "snip" else 0)


@struct.dataclass
class State:
    """Sums of calibration so far, in `params`: {role: {path of a kernel: scores}}."""

    params: dict[str, attribution.Sums]
    hp: Hparams


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.score not in SCORES:
        raise errors.unknown("prune score", hp.score, SCORES)
    return dict.fromkeys(ROLES, ())


def derive(model, world, params, plan, seed):
    del seed
    return {"behaviour": attribution.behaviour(model, world, params, plan)}


def located(safety_IxO, utility_IxO, q, p) -> jax.Array:
    """Entries in the top share q of safety that are not in the top share p of utility."""
    return attribution.top(safety_IxO, q) & ~attribution.top(utility_IxO, p)


def method(model: types.Model) -> types.Method:
    loss = losses.next_token(model)

    def summed(params, batch, hp):
        if hp.score == "snip":
            return attribution.snip(loss, params, batch, hp.targets)
        return attribution.wanda(model, params, batch, hp.targets)

    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> State:
        del rng
        sums = attribution.zeros(lineage.current, hp.targets)
        if hp.score == "wanda":
            sums = {path: jnp.zeros(x.shape[:2], x.dtype) for path, x in sums.items()}
        return State({role: jax.tree.map(jnp.copy, sums) for role in ROLES}, hp)

    def step(state: State, lineage: types.Lineage, batches, rng: types.Rng):
        del rng
        found = {
            role: summed(lineage.current, batches[role], state.hp) for role in ROLES
        }
        sums = jax.tree.map(jnp.add, state.params, found)
        tokens = {f"tokens/{role}": jnp.sum(batches[role].weights) for role in ROLES}
        return state.replace(params=sums), tokens

    def release(state: State, lineage: types.Lineage) -> types.Release:
        hp, pruned = state.hp, {}
        for path, kernel_NxIxO in edits.kernels(lineage.current, hp.targets).items():
            size_NxIxO = jnp.abs(tree.wide(kernel_NxIxO))
            scores = []
            for role in ROLES:
                sums = state.params[role][path]
                if hp.score == "wanda":
                    sums = jnp.sqrt(sums)[..., None]
                scores.append(size_NxIxO * sums)
            found = jax.lax.map(lambda x: located(*x, hp.q, hp.p), tuple(scores))
            pruned[path] = jnp.where(found, 0, kernel_NxIxO)
        return types.Release(edits.replace(lineage.current, pruned))

    return types.Method(streams, init, step, release)


_SETS = "arXiv:2402.05162: 128 rows of either set"
PRESETS = {
    "sandbox": plans.Plan(
        Hparams(p=0.1),
        batch_size=128,
        steps=1,
        source=f"{_SETS}; of its grid .01 to .1, the cell that harms `none` most",
    ),
    "wanda": plans.Plan(
        Hparams(q=0.03, p=0.1, score="wanda"),
        batch_size=128,
        steps=1,
        source=f"{_SETS}; as above",
    ),
}
