"""Unlearn-Smooth: unlearn, and flatten the forget loss so that relearning is slow.

Stage        alignment; unlearning before release.
Starts from  aligned
Template     T1 basin
Strategy     anchoring
Minimises    S(forget) + gamma * CE(benign), with forget = -CE(harmful) (graddiff), or
             -(2 / beta) log sigmoid(beta (CE - CE_reference)) of batch-mean CE (npo),
             and S, for the forget term alone,
             sam  forget(w + rho * g / ||g||), the gradient stopping at the shift;
             rs   the mean over `draws` of forget(w + sigma * N(0, I));
             gp   forget + rho * ||g||;
             cr   forget + rho * ||grad forget(w + mu * g / ||g||) - g||;
             wa   forget; the release averages the last steps' weights;
             none forget.
             `per_row` takes CE of each row, and means over rows of npo and CE.
Source       Fan et al. 2025, arXiv:2502.05374; code read at OPTML-Group/Unlearn-Smooth
             fc655ba (WMDP).
Evidence     CODE; `per_row` is what micro-batches of one row, accumulated, come to: CODE
             for code_npo, INF for code_cr, code_gp and code_wa.
Licence      MIT
Differs      gp and cr follow the paper: in the code `.item()` cuts their gradients, so
             that gp is npo, and cr would be npo with a doubled forget gradient;
             `shipped` = True repeats that. Their penalty is of the gradient of the
             whole batch, per_row or not.
Reduces to   npo (or graddiff) at rho = 0 or sigma = 0; SFT on the benign rows without
             the forget term.
Cost         3 forwards, 3 backwards (sam); 2 (none, wa), 1 + draws (rs), 3 (gp), 5 (cr);
             npo adds the reference's forward.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.methods import smoothing
from ftdefense.objectives import losses
from ftdefense.objectives import parts
from ftdefense.objectives import preferences

STARTS_FROM = "aligned"
BASES = ("npo", "graddiff")
NULL = {"rho": 0.0, "sigma": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    beta: float = 0.015  # Of npo, per nat.
    gamma: float = 2.25  # Weight of the benign loss.
    rho: float = 0.01  # sam: length, L2 over all that trains; gp, cr: weight.
    sigma: float = 1e-4  # rs: standard deviation of each weight's noise.
    mu: float = 0.01  # cr: length of the step.
    base: str = struct.field(pytree_node=False, default="npo")
    smooth: str = struct.field(pytree_node=False, default="sam")
    draws: int = struct.field(pytree_node=False, default=3)  # rs
    # wa: shares of the steps; 100, 105, .., 125 of 125 in the code.
    average_from: float = struct.field(pytree_node=False, default=0.8)
    average_every: float = struct.field(pytree_node=False, default=0.04)
    shipped: bool = struct.field(pytree_node=False, default=False)
    per_row: bool = struct.field(pytree_node=False, default=False)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.base not in BASES:
        raise errors.unknown("unlearn_smooth.base", hp.base, BASES)
    if hp.smooth not in smoothing.KINDS:
        raise errors.unknown("unlearn_smooth.smooth", hp.smooth, smoothing.KINDS)
    return {"harmful": (), "benign": ()}


def row_nats(model, batch, count, rng=None):
    """Nats per weighted token of each row, [B], of a `model(tokens, rng=None)`."""

    def compute(batch, rng):
        outputs = model(batch.tokens, rng=rng)
        logps_B, weight_B = preferences.sequence_logps(outputs, batch)
        return losses.average(-logps_B, weight_B)

    return parts.stacked(compute, batch, count, rng)


def nats(ctx, params, batch, rng):
    """Nats per weighted token: of the batch, or [B] of its rows."""
    if not ctx.hp.per_row:
        return ctx.loss(params, batch, rng)
    model = functools.partial(ctx.model, params)
    return row_nats(model, batch, ctx.hp.microbatches, rng)


def reference_nats(ctx, batch):
    """The same of the frozen model."""
    if ctx.hp.per_row:
        found = row_nats(ctx.reference, batch, ctx.hp.microbatches)
    else:
        said, weight = losses.weighted_sums(ctx.reference(batch.tokens), batch)
        found = losses.average(said, weight)
    return jax.lax.stop_gradient(found)


def forget_loss(ctx, harmful, rng):
    """`params -> loss`, lower when less is known of the harmful rows."""
    if ctx.hp.base == "graddiff":
        return lambda params: -jnp.mean(nats(ctx, params, harmful, rng))
    reference = reference_nats(ctx, harmful)

    def npo(params):
        gap = nats(ctx, params, harmful, rng) - reference
        return -2 / ctx.hp.beta * jnp.mean(jax.nn.log_sigmoid(ctx.hp.beta * gap))

    return npo


def direction(ctx, params, batches, rng, memory):
    hp = ctx.hp
    rng_harmful, rng_benign, rng_noise = jax.random.split(rng, 3)
    forget = forget_loss(ctx, batches["harmful"], rng_harmful)
    value, grad_forget = smoothing.value_and_grad(forget, params, hp, rng_noise)
    retain, grad_retain = jax.value_and_grad(
        lambda w: jnp.mean(nats(ctx, w, batches["benign"], rng_benign))
    )(params)
    grads = tree.add_scale(grad_forget, hp.gamma, grad_retain)
    metrics = {
        "loss/forget": value,
        "loss/benign": retain,
        "norm/forget": tree.norm(grad_forget),
    }
    if hp.smooth == "wa":
        memory = _include(memory, params, ctx.step, hp, ctx.steps)
    return grads, metrics, memory


def _include(memory, params, step, hp: Hparams, steps: int):
    """Adds the weights after `step` steps to the average, if their turn has come."""
    first = round(hp.average_from * steps)
    every = max(1, round(hp.average_every * steps))
    counts = (step >= first) & ((step - first) % every == 0)
    total = jax.tree.map(
        lambda t, p: jnp.where(counts, t + p.astype(t.dtype), t),
        memory["total"],
        params,
    )
    return {"total": total, "count": memory["count"] + counts}


def remember(ctx, params, rng):
    """Nothing, unless weights are averaged."""
    del rng
    if ctx.hp.smooth != "wa":
        return None
    total = optax.tree.zeros_like(optax.tree.cast(params, jnp.float32))
    return {"total": total, "count": jnp.int32(0)}


def method(model: types.Model) -> types.Method:
    lifted = lift.remembering_method(model, direction, streams, remember)

    def release(state, lineage):
        if state.hp.smooth == "wa":
            steps = state.hp.optimizer.steps
            kept = _include(state.memory, state.params, state.step, state.hp, steps)
            average = jax.tree.map(
                lambda t, p: (t / jnp.maximum(kept["count"], 1)).astype(p.dtype),
                kept["total"],
                state.params,
            )
            state = state.replace(params=average)
        return lifted.release(state, lineage)

    return lifted._replace(release=release)


def _published(learning_rate, beta, gamma, clip=1.0, **fields) -> plans.Plan:
    # A tenth, rounded down: the script says max_steps // 10.
    linear = schedules.Schedule(warmup_ratio=12 / 125, decay="linear")
    return plans.Plan(
        Hparams(
            optimizers.Optimizer(learning_rate, linear, clip=clip),
            beta=beta,
            gamma=gamma,
            **fields,
        ),
        batch_size=4,
        steps=125,
        source="OPTML-Group/Unlearn-Smooth fc655ba, WMDP/run_wmdp_unlearn.sh",
    )


def _muse(gamma: float) -> plans.Plan:
    return plans.Plan(
        Hparams(optimizers.Optimizer(1e-5), beta=0.1, gamma=gamma, rho=0.01),
        batch_size=4,
        epochs=10,
        source="OPTML-Group/Unlearn-Smooth fc655ba, MUSE: Llama-2-7B, a constant rate",
    )


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX.replace(learning_rate=2e-4)), steps=200
    ),
    "code": _published(5e-6, 0.015, 2.25, rho=0.01, smooth="sam"),
    "code_npo": _published(5e-6, 0.0225, 1.0, smooth="none", per_row=True),
    # Its code takes the optimizer's step itself, before Trainer would clip.
    "code_rs": _published(
        1e-5, 0.0125, 2.0, clip=float("inf"), sigma=1e-4, smooth="rs"
    ),
    "code_cr": _published(
        8.5e-6, 0.035, 1.0, rho=10.0, mu=0.01, smooth="cr", per_row=True
    ),
    # As shipped the penalty has no gradient; its weight, 0.01, is not the script's 10.
    "code_gp": _published(
        7.5e-6, 0.04, 1.0, rho=0.01, smooth="gp", shipped=True, per_row=True
    ),
    "code_wa": _published(5.5e-6, 0.05, 2.0, smooth="wa", per_row=True),
    "code_graddiff": _published(5e-6, 0.015, 1.0, rho=0.1, base="graddiff"),
    "muse_news": _muse(1.0),
    "muse_books": _muse(2.5),
}
