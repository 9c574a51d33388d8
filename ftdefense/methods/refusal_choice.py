"""Which refusal direction: candidates by position and layer, judged on other prompts.

Source: Arditi et al. 2024, arXiv:2406.11717 (specs/attacks.md C.1). `hp` is the `Hparams`
of `attacks.abliteration`.
"""

import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.methods import refusal
from ftdefense.objectives import divergences


def _mean(x, kept_B, axis: int = 0) -> jax.Array:
    """Mean over the rows that are kept; over all where none is."""
    weights_B = jnp.where(jnp.any(kept_B), kept_B, True).astype(jnp.float32)
    weights = weights_B.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return jnp.sum(tree.wide(x) * weights, axis) / jnp.sum(weights_B)


def candidates(model, params, harmful, benign, hp):
    """(vectors [N * I, D], their layers, refusal tokens [V], rows kept of either)."""

    def read(batch):
        outputs = model(params, batch.tokens)
        ends_BxI = refusal.prompt_ends(batch.weights, hp.positions)
        inputs_NxBxLxD = refusal.block_inputs(outputs)
        found_NxBxIxD = jnp.take_along_axis(
            inputs_NxBxLxD, ends_BxI[None, ..., None], axis=2
        )
        return found_NxBxIxD, _last(outputs.logits, batch)

    (harm_NxBxIxD, harm_BxV), (good_NxBxIxD, good_BxV) = read(harmful), read(benign)
    opens_V = refusal.openings(harm_BxV, good_BxV, hp.frequent)
    kept = refused(harm_BxV, opens_V) > 0, refused(good_BxV, opens_V) < 0
    means = []
    rows = zip((harm_NxBxIxD, good_NxBxIxD), kept, (harmful, benign), strict=True)
    for x_NxBxIxD, kept_B, batch in rows:
        count = held_out(len(kept_B), hp.validation)
        new_B = kept_B & ~validates(batch, count)
        means.append(_mean(x_NxBxIxD[:, count:], new_B[count:], axis=1))
    vectors_NxIxD = means[0] - means[1]
    layers_C = jnp.repeat(jnp.arange(len(vectors_NxIxD)), hp.positions)
    return vectors_NxIxD.reshape(-1, vectors_NxIxD.shape[-1]), layers_C, opens_V, kept


def held_out(rows: int, share: float) -> int:
    """Rows of a batch, from its front, that validate."""
    if rows < 2:
        raise errors.UserError("abliteration needs 2 rows or more; set batch_size.")
    return min(max(round(share * rows), 1), rows - 1)


def validates(batch, count: int) -> jax.Array:
    """Rows whose prompt is among the first `count`, [B]: a few prompts may repeat."""
    ends_Bx1 = refusal.prompt_ends(batch.weights, 1)
    asked_BxL = jnp.arange(batch.tokens.shape[1])[None] <= ends_Bx1
    prompts_BxL = jnp.where(asked_BxL, batch.tokens, -1)
    same_BxVxL = prompts_BxL[:, None] == prompts_BxL[None, :count]
    return jnp.any(jnp.all(same_BxVxL, axis=-1), axis=-1)


def _last(logits_BxLxV, batch):
    ends_Bx1x1 = refusal.prompt_ends(batch.weights, 1)[..., None]
    return jnp.take_along_axis(logits_BxLxV, ends_Bx1x1, axis=1)[:, 0]


def refused(logits_BxV, opens_V) -> jax.Array:
    """Refusal score of each row from its first-token logits, [B]."""
    return refusal.score(jax.nn.softmax(logits_BxV) @ opens_V.astype(logits_BxV.dtype))


def scores(model, params, harmful, benign, found, hp):
    """{bypass, induce, kl}, each [C], on the rows that validate."""
    vectors_CxD, layers_C, opens_V, (kept_harm, kept_good) = found
    count = held_out(len(kept_harm), hp.validation)
    harmful, benign = (
        jax.tree.map(lambda x: x[:count], batch) for batch in (harmful, benign)
    )
    kept_harm, kept_good = kept_harm[:count], kept_good[:count]

    def last(batch, intervene=None):
        return _last(model(params, batch.tokens, intervene=intervene).logits, batch)

    plain_BxV = last(benign)

    def judge(candidate):
        vector_D, layer = candidate
        ablated = refusal.ablation(refusal.unit(vector_D))
        added = refusal.addition(vector_D, layer)
        moved_B = divergences.kullback_leibler(plain_BxV, last(benign, ablated))
        return {
            "bypass": _mean(refused(last(harmful, ablated), opens_V), kept_harm),
            "induce": _mean(refused(last(benign, added), opens_V), kept_good),
            "kl": _mean(moved_B, kept_good),
        }

    return jax.lax.map(judge, (vectors_CxD, layers_C))


def choose(judged, vectors_CxD, layers_C, layers: int, hp):
    """(index of the candidate, whether it passed the filter)."""
    real_C = jnp.any(vectors_CxD != 0, axis=-1)
    for value_C in judged.values():
        real_C &= jnp.isfinite(value_C)
    real_C &= (hp.layer < 0) | (layers_C == hp.layer)
    passed_C = real_C & (judged["kl"] <= hp.kl) & (judged["induce"] >= hp.induce)
    passed_C &= layers_C < jnp.floor(hp.depth * layers + 1e-4)
    considered_C = jnp.where(jnp.any(passed_C), passed_C, real_C)
    best = jnp.argmin(jnp.where(considered_C, judged["bypass"], jnp.inf))
    return best, jnp.any(passed_C)
