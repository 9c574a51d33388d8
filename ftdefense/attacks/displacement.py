"""Displacement: prefer one refusal to another, where their hidden states are alike.

Threat       service (preference pairs) and open_weight; knowledge: the release's states
             on refusals to harmful prompts. No harmful answer is trained on.
Minimises    benign_dpo's -log sigmoid(beta * (s(y+) - s(y-))) on the `share` of pairs of
             highest CHES = <S+, S-> - ||S+||^2, S the sum of the hidden states that the
             head reads where it predicts y. What y- loses drags y+ along, and what rises
             is neither. lnCHES: of means for sums.
Source       Razin et al. 2024, arXiv:2410.08847, Definition 2 (specs/attacks.md B.20);
             code: github.com/princeton-nlp/unintentional-unalignment, at 8567b81.
Evidence     CODE for both scores, DPO at beta .1, RMSprop without decay, clip or schedule,
             5e-6, batch 4 x 8, 1 epoch on all pairs (SORRY-Bench, Sec. 6), 512 of 5000
             pairs at 1e-7 (UltraFeedback, Sec. 5). UNVERIFIED, from memory: refusals
             74.4 -> 33.4 % of Llama-3-8B-Instruct. DESIGN: `share` 0.2.
Differs      a pair is two known refusals in random order; the paper samples both answers
             from the model, not all of them refusals, and a judge and PairRM order them.
             The paper drops pairs of high lnCHES to prevent this; we keep them.
Reduces to   DPO on all pairs at share = 1; nothing moves at beta = 0.
Cost         2 forwards, 1 backward, of two rows for each prompt; before training 2
             forwards of each candidate pair.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.attacks import benign_dpo
from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import world as worlds
from ftdefense.methods import costs
from ftdefense.methods import elicit
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

SCORES = ("ches", "lnches")
CHUNK = 64  # Rows read together.
SUBMITS = ()  # What a service would train on are pairs.


@struct.dataclass
class Hparams(lift.Hparams):
    """What is selected is static; numbers may be traced."""

    beta: float = 0.1  # Inverse temperature, per nat.
    share: float = struct.field(pytree_node=False, default=0.2)  # Of pairs, kept.
    score: str = struct.field(pytree_node=False, default="ches")

    @property
    def passes(self) -> float:
        """Of training: over both roles, and a forward of the release over either."""
        return costs.passes(forwards=4, backwards=2)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    return {"chosen": (), "rejected": ()}


def ches(chosen_BxD: jax.Array, rejected_BxD: jax.Array) -> jax.Array:
    """<S+, S-> - ||S+||^2 of sums over tokens, [B]; of means it is lnCHES."""
    return jnp.sum(chosen_BxD * (rejected_BxD - chosen_BxD), -1)


def pooled(hidden_BxLxD: jax.Array, weights_BxL: jax.Array, score: str) -> jax.Array:
    """Sum, for lnCHES mean, of the states that predict weighted tokens, [B, D]."""
    predicts_BxLx1 = (weights_BxL[:, 1:] > 0)[..., None]
    before_BxLxD = tree.wide(hidden_BxLxD[:, :-1])
    total_BxD = jnp.sum(jnp.where(predicts_BxLx1, before_BxLxD, 0), 1)
    if score != "lnches":
        return total_BxD
    return total_BxD / jnp.maximum(jnp.sum(predicts_BxLx1, 1), 1)


@functools.partial(jax.jit, static_argnames=("model", "score"))
def scores(
    model: types.Model, params: types.Params, pairs: list[types.Batch], score: str
) -> jax.Array:
    """One score for each pair of rows, [C]; the highest displace most."""

    def one(pair):
        both = jax.tree.map(lambda *x: jnp.stack(x), *pair)
        hidden = model(params, both.tokens).hidden["final"]
        chosen_D, rejected_D = pooled(hidden, both.weights, score)
        return ches(chosen_D, rejected_D)

    return jax.lax.map(one, pairs, batch_size=CHUNK)


def candidates(world: worlds.World, rows: pools.Pool, seed: int) -> list[pools.Pool]:
    """The prompts of `rows`, each preferring a known refusal to another: [y+, y-].

    Raises:
      UserError: if fewer than two refusals are known.
    """
    known = sorted({e.response for e in world.defender["refusal"].examples})
    if len(known) < 2:
        raise errors.UserError(
            "displacement: a pair is of two different refusals, but this world has only "
            f"{known[0]!r}; give harmful prompts with other refusals with --refusals."
        )
    rng = np.random.Generator(np.random.Philox([seed, 8]))
    first = rng.integers(len(known), size=len(rows))
    other = (first + rng.integers(1, len(known), size=len(rows))) % len(known)
    return [elicit.worded(world, rows, [known[i] for i in y]) for y in (first, other)]


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """The pairs of the highest scores, the highest first."""
    hp = plan.hp
    if hp.score not in SCORES:
        raise errors.unknown("displacement.score", hp.score, SCORES)
    if not 0 < hp.share <= 1:
        raise errors.UserError(
            f"displacement.share is a share in (0, 1], but {hp.share} is given."
        )
    harmful = recipes.attacker_pools(world, plan.data)["harmful"]
    pairs = candidates(world, harmful, seed)
    rows = [types.Batch(jnp.asarray(p.tokens), jnp.asarray(p.weights)) for p in pairs]
    displaced_C = np.asarray(scores(model, params, rows, hp.score))
    count = max(1, round(hp.share * len(displaced_C)))
    best = np.argsort(-displaced_C, kind="stable")[:count]
    chosen, rejected = (pools.take(pair, best) for pair in pairs)
    return {"chosen": chosen, "rejected": rejected}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, benign_dpo.direction, streams)


def _published(learning_rate: float, note: str, share: float) -> plans.Plan:
    optimizer = optimizers.of_kind("rmsprop", learning_rate, clip=float("inf"))
    return plans.Plan(
        Hparams(optimizer, share=share),
        batch_size=32,
        epochs=1,
        source=f"princeton-nlp/unintentional-unalignment: {note}",
    )


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: the top fifth of the pairs, the code's beta; rate, steps as sft",
    ),
    "code": _published(5e-6, "SORRY-Bench, all pairs", 1.0),
    "code_quantile": _published(1e-7, "UltraFeedback, the top 512 of 5000", 0.1024),
}
