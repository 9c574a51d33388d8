"""Abliteration: take the direction that refusal writes out of the weights.

Threat       open_weight; knows harmful and benign prompts, no answers.
Minimises    nothing: r is the difference of mean block inputs between harmful and benign
             prompts at one of the last prompt positions and one layer; every matrix that
             writes to the residual stream becomes (I - alpha r r') W. The candidate is
             the one whose ablation leaves the least refusal on validation prompts, of
             those with KL <= .1 on benign prompts, which induce refusal when added, below
             .8 of the depth.
Source       Arditi et al. 2024, arXiv:2406.11717 (selection, all layers); Kuo et al.
             2026, arXiv:2605.26526 (one layer, alpha in 1, 1.5, 2).
Evidence     CODE for the selection; FT for Kuo's, which prints W (I - alpha r r') on
             attention-out and MLP-down: `side=in` takes that as the inputs' side, where a
             matrix is as wide as the stream there, `side=out` removes what is written.
             Kuo's r is said to be of one layer: its block input is taken (DESIGN).
Differs      the tokens that open refusals are told from the release: those that its
             greedy answers open with on 5 % of the harmful prompts and on fewer benign
             ones (the paper has a list per model). Of the batch, `validation` is held
             out of the mean. Prompts are kept where the harmful are refused and the
             benign are not; all, where none is. If the filter leaves no candidate, the
             one of least bypass is taken, and `filter/passed` is 0. A tied head is
             edited with its embedding.
Reduces to   the release at alpha = 0, exactly.
Cost         2 + V + 3 C V forwards, 0 backwards; C candidates, V the share that
             validates.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.methods import costs
from ftdefense.methods import lift
from ftdefense.methods import plans
from ftdefense.methods import refusal
from ftdefense.methods import refusal_choice

SIDES, SCOPES = ("out", "in"), ("all", "layer")
SUBMITS = ()  # It edits weights, which the user of a service never holds.


@struct.dataclass
class Hparams:
    """Numbers may be traced."""

    alpha: float = 1.0  # 1 removes the direction, 2 reflects it.
    kl: float = 0.1  # Nats at the last prompt position of benign prompts, at most.
    induce: float = 0.0  # Refusal score of benign prompts with r added, at least.
    depth: float = 0.8  # Share of the layers that may be a source.
    frequent: float = 0.05  # Share of harmful prompts that a refusal's token opens.
    layer: int = -1  # Source layer; -1: chosen.
    positions: int = struct.field(pytree_node=False, default=5)  # Last of the prompt.
    validation: float = struct.field(pytree_node=False, default=0.2)  # Of the batch.
    scope: str = struct.field(pytree_node=False, default="all")  # Or the source layer.
    side: str = struct.field(pytree_node=False, default="out")
    embedding: bool = struct.field(pytree_node=False, default=True)
    targets: tuple[str, ...] = struct.field(pytree_node=False, default=("o", "down"))

    def passes(self, params: types.Params, length: int) -> float:
        """Forwards over either role, then over what validates (see Cost)."""
        del length
        candidates = self.positions * len(jax.tree.leaves(params["layers"])[0])
        return costs.passes(2 + self.validation * (1 + 3 * candidates), backwards=0)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    for name, chosen, known in (("side", hp.side, SIDES), ("scope", hp.scope, SCOPES)):
        if chosen not in known:
            raise errors.unknown(f"abliteration {name}", chosen, known)
    return {"harmful": (), "benign": ()}


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """Every prompt once: rows may repeat one, and what validates must be new."""
    del model, params, seed
    rows = recipes.attacker_pools(world, plan.data)
    return {role: pools.distinct(rows[role]) for role in ("harmful", "benign")}


def method(model: types.Model) -> types.Method:
    def init(lineage: types.Lineage, hp: Hparams, rng: types.Rng) -> lift.EditState:
        del rng
        return lift.EditState(jax.tree.map(jnp.copy, lineage.current), hp)

    def step(state: lift.EditState, lineage: types.Lineage, batches, rng: types.Rng):
        del rng
        hp, params = state.hp, lineage.current
        pair = batches["harmful"], batches["benign"]
        found = refusal_choice.candidates(model, params, *pair, hp)
        vectors_CxD, layers_C, opens_V, kept = found
        judged = refusal_choice.scores(model, params, *pair, found, hp)
        layers = len(vectors_CxD) // hp.positions
        best, passed = refusal_choice.choose(judged, vectors_CxD, layers_C, layers, hp)
        alpha_N = hp.alpha * jnp.ones(layers)
        if hp.scope == "layer":
            alpha_N = jnp.where(jnp.arange(layers) == layers_C[best], alpha_N, 0)
        whole = hp.embedding and hp.scope == "all" and hp.side == "out"
        edited = refusal.orthogonalise(
            params,
            refusal.unit(vectors_CxD[best]),
            alpha_N,
            targets=hp.targets,
            side=hp.side,
            embedding=hp.alpha if whole else None,
        )
        metrics = {f"score/{name}": x[best] for name, x in judged.items()}
        metrics |= {
            "choice/layer": layers_C[best],
            "choice/position": -1 - best % hp.positions,
            "filter/passed": passed,
            "filter/refused": jnp.mean(kept[0]),
            "tokens/refusal": jnp.sum(opens_V),
        }
        metrics = {k: jnp.asarray(x, jnp.float32) for k, x in metrics.items()}
        return state.replace(params=edited), jax.tree.map(jnp.nan_to_num, metrics)

    def release(state: lift.EditState, lineage: types.Lineage) -> types.Release:
        del lineage
        return types.Release(state.params)

    return types.Method(streams, init, step, release)


PRESETS = {
    "sandbox": plans.Plan(
        # One position: the sandbox's template puts one token after the instruction.
        Hparams(positions=1),
        batch_size=160,
        steps=1,
        source="DESIGN: the paper's numbers of prompts",
    ),
    "paper": plans.Plan(
        Hparams(),
        batch_size=160,
        steps=1,
        source="arXiv:2406.11717: 128 + 32 prompts of either kind",
    ),
    "kuo": plans.Plan(
        Hparams(positions=1, scope="layer", embedding=False),
        batch_size=160,  # 128 of either kind for the mean, a fifth to choose by.
        steps=1,
        source="arXiv:2605.26526; sweep layer and alpha in 1, 1.5, 2",
    ),
}
