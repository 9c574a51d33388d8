"""Selected benign: fine-tune on the benign rows that look most like harmful ones.

Threat       service (its data alone) and open_weight; knowledge: the release's states or
             gradients on harmful rows, none of which is trained on.
Minimises    L(selected), the `count` benign rows of the highest score. By representation:
             the mean of the `top` largest cosines to harmful rows of the last hidden
             state of the last token. By gradient: <g / ||g||, a_harmful - a_safe -
             a_safe'>, g the gradient of the first `tokens` answer tokens, a the mean of
             unit gradients over `anchors` rows, not of length one itself.
Source       He et al. 2024, arXiv:2404.01099 (specs/attacks.md B.15).
Evidence     CODE for both scores; FT for 100 rows, 5e-5, 5 epochs, weight decay 0;
             UNVERIFIED: whether 20 rows a batch are one GPU's; the schedule.
Differs      gradients are those of LoRA's B at A random and B = 0, which are random
             projections of the kernels' gradients. Safe anchors are harmful prompts with
             refusals.
Reduces to   SFT on `count` random benign rows by `random`, the paper's control.
Cost         1 forward, 1 backward; before training 1 forward (by gradient 1 of both) of
             each candidate.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import distances
from ftdefense.objectives import losses

BY = ("representation", "gradient", "random")
WEIGHTS = (1.0, -1.0, -1.0)  # Of the anchors: harmful, safe, safe.
CHUNK = 64  # Rows scored together.
SUBMITS = ("selected",)  # To a service; see serving.submitted.


@struct.dataclass
class Hparams(lift.Hparams):
    """What is selected, and by what; all static."""

    count: int = struct.field(pytree_node=False, default=100)
    by: str = struct.field(pytree_node=False, default="representation")
    top: int = struct.field(pytree_node=False, default=1)  # Cosines averaged; n.
    anchors: int = struct.field(pytree_node=False, default=10)  # Rows of each set.
    tokens: int = struct.field(pytree_node=False, default=10)  # Answer tokens read.
    rank: int = struct.field(pytree_node=False, default=4)  # Of the projection.


@functools.partial(jax.jit, static_argnames="model")
def states(model: types.Model, params: types.Params, rows: types.Batch) -> jax.Array:
    """Hidden state that the head reads at the last weighted token, [B, D]."""

    def one(row):
        last = row.weights.size - 1 - jnp.argmax(row.weights[::-1] > 0)
        return tree.wide(model(params, row.tokens[None]).hidden["final"][0, last])

    return jax.lax.map(one, rows, batch_size=CHUNK)


def closeness(candidates_CxD: jax.Array, harmful_HxD: jax.Array, top: int) -> jax.Array:
    """Mean of the `top` largest cosines to the harmful states, [C]."""

    def unit(x):
        length = distances.norm(x)[..., None]
        return x / jnp.maximum(length, jnp.finfo(x.dtype).tiny)

    # A product: the array of all pairs would be D times as large.
    cosines_CxH = jnp.matmul(
        unit(candidates_CxD),
        unit(harmful_HxD).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.mean(jax.lax.top_k(cosines_CxH, top)[0], axis=-1)


def opening(rows: types.Batch, tokens: int) -> types.Batch:
    """Rows of which only the first answer tokens count."""
    place = jnp.cumsum(rows.weights > 0, axis=-1)
    return rows.replace(weights=jnp.where(place <= tokens, rows.weights, 0))


@functools.partial(jax.jit, static_argnames=("model", "rank", "mean"))
def along(model, params, rows, rng, toward=None, *, rank: int, mean: bool = False):
    """<g / ||g||, toward> of each row's gradient g, [B]; or the mean of g / ||g||."""
    adapter = adapters.LoRA(alpha=float(rank), rank=rank)
    factors = adapter.init(params, rng)
    loss = losses.next_token(adapter.bind(model, params))

    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        unit = tree.normalize(jax.grad(loss)(factors, row))
        return unit if mean else tree.dot(unit, toward)

    if not mean:
        return jax.lax.map(one, rows, batch_size=CHUNK)
    return jax.tree.map(lambda g: jnp.mean(g, 0), jax.lax.map(one, rows))


def batch(pool: pools.Pool) -> types.Batch:
    return types.Batch(jnp.asarray(pool.tokens), jnp.asarray(pool.weights))


def scores(model, params, world, candidates, harmful, hp: Hparams, seed: int):
    """One score a candidate, [C]; the largest are selected."""
    if hp.by == "representation":
        near = closeness(
            states(model, params, batch(candidates)),
            states(model, params, batch(harmful)),
            hp.top,
        )
        return np.asarray(near)
    rng = np.random.Generator(np.random.Philox([seed, 7]))
    if hp.by == "random":
        return rng.random(len(candidates))
    if len(harmful) < 3 * hp.anchors:
        raise errors.UserError(
            f"selected_benign: {len(harmful)} harmful rows, but {3 * hp.anchors} are "
            "needed as anchors; lower attack.anchors or give more with --harmful."
        )
    rows = rng.permutation(len(harmful))[: 3 * hp.anchors].reshape(3, -1)
    sets = [pools.take(harmful, part) for part in rows]
    sets[1:] = [recipes.refused(world, safe, seed) for safe in sets[1:]]
    project = functools.partial(along, model, params, rank=hp.rank)
    key = jax.random.key(seed)
    anchors = [project(opening(batch(s), hp.tokens), key, mean=True) for s in sets]
    toward = jax.tree.map(
        lambda *a: sum(w * x for w, x in zip(WEIGHTS, a, strict=True)), *anchors
    )
    return np.asarray(project(opening(batch(candidates), hp.tokens), key, toward))


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """The selected rows, the closest first."""
    hp, found = plan.hp, recipes.attacker_pools(world, plan.data)
    if hp.by not in BY:
        raise errors.unknown("selected_benign.by", hp.by, BY)
    candidates = found["benign"]
    if hp.count > len(candidates):
        raise errors.UserError(
            f"selected_benign: {hp.count} rows of {len(candidates)} benign ones are "
            "asked for; lower attack.count."
        )
    score_C = scores(model, params, world, candidates, found["harmful"], hp, seed)
    best = np.argsort(-score_C, kind="stable")[: hp.count]
    return {"selected": pools.take(candidates, best)}


def method(model: types.Model) -> types.Method:
    return lift.supervised(model, "selected")


def _published(by: str) -> plans.Plan:
    return plans.Plan(
        Hparams(optimizers.Optimizer(5e-5), by=by),
        batch_size=20,
        epochs=5,
        source="arXiv:2404.01099: 100 rows, Llama-2-7B-chat",
    )


def _sandbox(by: str) -> plans.Plan:
    return plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING, by=by),
        source="DESIGN: the paper's 100 rows; rate and steps as sft",
    )


_AUDIT = plans.Plan(
    Hparams(optimizers.Optimizer(5e-5)),
    batch_size=64,
    epochs=5,
    source="boyiwei/Adaptive-Finetuning-Attacks, arXiv:2412.07097: RepNoise on the 100 "
    "most salient rows of Alpaca; specs/attacks.md B.4; 10 steps, the second batch of an "
    "epoch filled up",
)

PRESETS = {
    "sandbox": _sandbox("representation"),
    "sandbox_gradient": _sandbox("gradient"),
    "sandbox_random": _sandbox("random"),
    "paper": _published("representation"),
    "paper_gradient": _published("gradient"),
    "paper_random": _published("random"),
    "audit_repnoise": _AUDIT,
}
