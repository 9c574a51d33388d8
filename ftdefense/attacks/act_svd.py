"""ActSVD: remove from each matrix the output directions in which refusals live.

Threat       open_weight; knows harmful prompts and benign pairs. The refusals are the
             release's own answers.
Minimises    nothing. With U the left singular vectors of the outputs Y = W X at answer
             positions: `remove` W - U_r U_r' W of the r top directions of refusals;
             `difference` W - (I - P_u) P_s W, P_u and P_s the projections on all but the
             last `left_utility` and `left_safety` directions of benign answers and of
             refusals.
Source       Wei et al. 2024, arXiv:2402.05162.
Evidence     CODE for the formulas; as in its command line, the two ranks are those that
             are left out, of R = min(inputs, outputs). Its best ranks are second-hand
             (2.5 % of ranks).
Differs      exact eigenvectors of Y Y' for its truncated randomised SVD; ranks below 1
             are shares of R; the safety set is what the release says to the attacker's
             harmful prompts, whatever it says (DESIGN).
Reduces to   the release at rank = 0, or where P_s = P_u.
Cost         2 forwards, and an eigendecomposition per matrix and role.
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

MODES = ("remove", "difference")
ROLES = ("behaviour", "benign")
_ROUNDING = 1e-4
_EXACT = jax.lax.Precision.HIGHEST
SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    rank: float = 1.0  # Directions that `remove` takes out; below 1 a share of R.
    left_safety: float = 0.98  # Of refusals, left out of P_s; below 1 a share of R.
    left_utility: float = 0.85  # Of benign answers, left out of P_u; likewise.
    mode: str = struct.field(pytree_node=False, default="difference")
    targets: tuple[str, ...] = struct.field(
        pytree_node=False, default=adapters.PROJECTIONS
    )

    @property
    def passes(self) -> float:
        """A forward over each role that is read (see Cost)."""
        return costs.passes(forwards=len(streams(self)), backwards=0)


@struct.dataclass
class State:
    """Second moments so far, in `params`: {role: {path of a kernel: [N, O, O]}}."""

    params: dict[str, attribution.Sums]
    hp: Hparams


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.mode not in MODES:
        raise errors.unknown("act_svd mode", hp.mode, MODES)
    return dict.fromkeys(ROLES if hp.mode == "difference" else ROLES[:1], ())


def derive(model, world, params, plan, seed):
    del seed
    return {"behaviour": attribution.behaviour(model, world, params, plan)}


def counted(rank: float | jax.Array, most: int) -> jax.Array:
    """A number of ranks; below 1, a share of `most`."""
    return jnp.floor(jnp.where(rank < 1, rank * most, rank) + _ROUNDING)


def project(x_IxO: jax.Array, moments_OxO: jax.Array, rank: jax.Array) -> jax.Array:
    """`x` on the `rank` top eigenvectors of the outputs' moments."""
    _, vectors_OxO = jnp.linalg.eigh(moments_OxO)  # Ascending.
    size = moments_OxO.shape[0]
    kept_1xO = (jnp.arange(size) >= size - rank)[None]
    along_IxO = jnp.matmul(x_IxO, vectors_OxO, precision=_EXACT) * kept_1xO
    return jnp.matmul(along_IxO, vectors_OxO.T, precision=_EXACT)


def reduced(kernel_IxO, moments, hp: Hparams) -> jax.Array:
    """One matrix without what is refusal's: kernels are the paper's W transposed."""
    safety_OxO, most = moments["behaviour"], min(kernel_IxO.shape)
    if hp.mode == "remove":
        rank = counted(hp.rank, most)
        return kernel_IxO - project(kernel_IxO, safety_OxO, rank)
    ranks = (most - counted(left, most) for left in (hp.left_safety, hp.left_utility))
    rank_safety, rank_utility = ranks
    safe_IxO = project(kernel_IxO, safety_OxO, rank_safety)
    useful_IxO = project(safe_IxO, moments["benign"], rank_utility)
    return kernel_IxO - (safe_IxO - useful_IxO)


def method(model: types.Model) -> types.Method:
    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> State:
        del rng
        sums = {
            path: jnp.zeros((len(x), x.shape[2], x.shape[2]), x.dtype)
            for path, x in attribution.zeros(lineage.current, hp.targets).items()
        }
        return State({r: jax.tree.map(jnp.copy, sums) for r in streams(hp)}, hp)

    def step(state: State, lineage: types.Lineage, batches, rng: types.Rng):
        del rng
        found = {
            role: attribution.outputs(
                model, lineage.current, batches[role], state.hp.targets
            )
            for role in state.params
        }
        tokens = {f"tokens/{role}": jnp.sum(batches[role].weights) for role in found}
        return state.replace(params=jax.tree.map(jnp.add, state.params, found)), tokens

    def release(state: State, lineage: types.Lineage) -> types.Release:
        edited = {}
        kernels = edits.kernels(lineage.current, state.hp.targets)
        for path, kernel_NxIxO in kernels.items():
            moments = {role: sums[path] for role, sums in state.params.items()}
            new_NxIxO = jax.lax.map(
                lambda x: reduced(*x, state.hp), (tree.wide(kernel_NxIxO), moments)
            )
            edited[path] = new_NxIxO.astype(kernel_NxIxO.dtype)
        return types.Release(edits.replace(lineage.current, edited))

    return types.Method(streams, init, step, release)


_SETS = "arXiv:2402.05162: 128 rows of either set"
PRESETS = {
    "sandbox": plans.Plan(
        Hparams(left_safety=0.99, left_utility=0.9),
        batch_size=128,
        steps=1,
        source=f"{_SETS}; DESIGN: ranks that harm `none` most, of a few; sweep them",
    ),
    "remove": plans.Plan(
        Hparams(mode="remove"),
        batch_size=128,
        steps=1,
        source=f"{_SETS}; DESIGN: one rank; sweep it",
    ),
}
