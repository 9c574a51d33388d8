"""T-Vaccine: Vaccine on a few layers, drawn by how much harmful data moves them.

Stage        alignment.
Template     T1 basin
Strategy     anchoring
Minimises    Vaccine's loss with shifts in `layers` drawn layers alone, one norm over
             these; every `score_every` steps a layer's probability becomes its share of
             the norms of the harmful loss's gradient at the shifts, every `draw_every`
             steps layers are drawn without replacement. Attention leaves of the other
             layers are frozen (`scope` = attention), or all of theirs (layers).
Source       Liu et al. 2024, arXiv:2410.09760; code read at Lslland/T-Vaccine 4513750.
Evidence     CODE; UNVERIFIED whether the paper draws anew at each step, and freezes
             whole layers.
Licence      no licence file found; rewritten from the formulas.
Differs      layers are drawn by Gumbel top-k: NumPy's law, other random numbers. The
             frozen leaves are skipped, but their gradients are still computed.
Reduces to   Vaccine with all layers drawn; SFT on the alignment data at rho = 0 then.
Cost         2 forwards, 2 backwards; one more of both every `score_every` steps.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import freezing
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.methods import shifts
from ftdefense.objectives import losses

NULL = {"rho": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    rho: float = 3.0  # Length of the shift, L2 over drawn layers, tokens and batch.
    layers: int = struct.field(pytree_node=False, default=8)  # Drawn; gamma.
    draw_every: int = struct.field(pytree_node=False, default=20)  # Steps; J.
    score_every: int = struct.field(pytree_node=False, default=200)  # Steps; K.
    scored_rows: int = struct.field(pytree_node=False, default=1)  # Of the batch.
    scope: str = struct.field(pytree_node=False, default="attention")


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.scope not in freezing.SCOPES:
        raise errors.unknown("t_vaccine.scope", hp.scope, freezing.SCOPES)
    adapters.all_blocks(hp.adapter, "t_vaccine")
    return {"alignment": (), "harmful": ()}


def score(ctx, params, harmful, rng) -> jax.Array:
    """Probabilities [N]: shares of the norms of the harmful gradient at the shifts."""
    rows = jax.tree.map(lambda x: x[: ctx.hp.scored_rows], harmful)
    ctx = ctx._replace(loss=losses.next_token(ctx.model))  # Too few rows to split.
    _, g_NxBxLxD = shifts.gradient(ctx, params, rows, rng, "attn")
    norm_N = jnp.sqrt(jnp.sum(jnp.square(g_NxBxLxD), (1, 2, 3)))
    return norm_N / jnp.maximum(jnp.sum(norm_N), jnp.finfo(norm_N.dtype).tiny)


def draw(rng, probability_N: jax.Array, count: int) -> jax.Array:
    """A mask [N] of `count` distinct layers (all, if there are fewer)."""
    layers = probability_N.shape[0]
    chosen = jax.random.choice(
        rng, layers, (min(count, layers),), replace=False, p=probability_N
    )
    return jnp.zeros(layers, bool).at[chosen].set(True)


def direction(ctx, params, batches, rng, memory):
    hp, batch = ctx.hp, batches["alignment"]
    rng_score, rng_draw, rng_clean, rng_shifted = jax.random.split(rng, 4)
    scores = ctx.step % hp.score_every == 0
    scored_N = phases.only_if(
        scores, lambda: score(ctx, params, batches["harmful"], rng_score)
    ).astype(jnp.float32)
    probability_N = jnp.where(scores, scored_N, memory["probability"])
    drawn_N = jnp.where(
        ctx.step % hp.draw_every == 0,
        draw(rng_draw, probability_N, hp.layers),
        memory["drawn"],
    )
    clean, g_NxBxLxD = shifts.gradient(ctx, params, batch, rng_clean, "attn")
    # The norm is over the drawn layers: the length stays rho however many they are.
    g_NxBxLxD = jnp.where(drawn_N[:, None, None, None], g_NxBxLxD, 0)
    shift_NxBxLxD = hp.rho * tree.normalize(g_NxBxLxD)
    shifted, grads = shifts.value_and_grad(
        ctx, params, batch, rng_shifted, "attn", shift_NxBxLxD
    )
    metrics = {
        "loss/alignment": clean,
        "loss/shifted": shifted,
        "norm/shift": tree.norm(shift_NxBxLxD),
    }
    return grads, metrics, {"probability": probability_N, "drawn": drawn_N}


def remember(ctx, params, rng) -> dict[str, jax.Array]:
    """Before the first score: no layer is preferred."""
    del rng
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    layers = jax.eval_shape(ctx.model, params, tokens).hidden["attn"].shape[0]
    return {
        "probability": jnp.full((layers,), 1 / layers, jnp.float32),
        "drawn": jnp.zeros((layers,), bool),
    }


def active(ctx, params, memory):
    """What trains in this step."""
    return freezing.by_layer(params, memory["drawn"], ctx.hp.scope)


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, streams, remember, active)


_COSINE = schedules.Schedule(warmup_ratio=0.1, decay="cosine")
_CODE = Hparams(
    optimizers.Optimizer(1e-3, _COSINE, weight_decay=0.1, kind="adamw_by_leaf"),
    adapters.LoRA(alpha=4.0, dropout=0.1, rank=8),
)

PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(
            optimizers.SANDBOX_ALIGNMENT.replace(kind="adamw_by_leaf"),
            rho=20.0,
            layers=1,
        )
    ),
    "code": plans.Plan(
        _CODE,
        batch_size=10,
        epochs=20,
        source="Lslland/T-Vaccine 4513750, script/alignment/T-Vaccine.sh",
    ),
    "code_qwen": plans.Plan(
        _CODE.replace(layers=5),
        batch_size=10,
        epochs=20,
        source="Lslland/T-Vaccine 4513750: 5 layers for Qwen2 and for DecodingTrust",
    ),
}
