"""Lisa: alternate between alignment and user steps, each near the other's last weights.

Stage        fine_tuning; the provider trains on alignment rows and on the user's rows.
Template     none
Strategy     anchoring
Minimises    in the state `alignment` f_A(w) + rho / 2 ||w - w_U||^2, in the state `user`
             f_U(w) + rho / 2 ||w - w_A||^2, over all that trains; w_A and w_U are the
             weights at which the alignment and the user state last ended, at first
             those of the start. K_A steps of alignment, K_U of user, and again; the
             penalty counts after the first tenth of all steps. One optimizer for both.
Source       Huang et al. 2024, arXiv:2405.18641; code read at git-disl/Lisa 68e3659
             (specs: defenses_unlearning_and_traps 11.1).
Evidence     CODE
Licence      no licence file found; rewritten from the formulas.
Differs      a batch of each role is drawn at every step, and the one that the state does
             not use is dropped; the code drops the user's alone. An anchor is kept in the
             dtype of the weights.
Reduces to   bi-state optimization at rho = 0; SFT on user towards the start at K_A = 0;
             SFT on alignment at K_U = 0 and rho = 0.
Cost         1 forward, 1 backward; two copies of what trains.
"""

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

# Ratios of steps are counted in float32: 0.1 * 30 must not round below 3.
_ROUNDING = 1e-4


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced."""

    alignment_steps: int = 100  # Steps of one alignment state; K_1 in the code.
    user_steps: int = 900  # Steps of one user state; K_2 in the code.
    rho: float = 1.0  # Weight of the proximal term.
    free_ratio: float = 0.1  # Share of all steps, the first, without that term.


@struct.dataclass
class Memory:
    """The state machine.

    Attributes:
      aligning: bool, the state of the last step.
      clock: int32, steps taken in it.
      w_alignment, w_user: what trains, when that state last ended.
    """

    aligning: jax.Array
    clock: jax.Array
    w_alignment: types.Params
    w_user: types.Params


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    del hp
    # The first role counts the epochs: they are the user's.
    return {"user": (), "alignment": ()}


def memory(ctx, params, rng) -> Memory:
    del rng
    aligning = jnp.asarray(ctx.hp.alignment_steps > 0)
    copies = (jax.tree.map(jnp.copy, params) for _ in range(2))
    return Memory(aligning, jnp.int32(0), *copies)


def advance(ctx, params, state: Memory) -> Memory:
    """Ends a state that has had its steps, and notes the weights at its end."""
    hp, was = ctx.hp, state.aligning
    length = jnp.where(was, hp.alignment_steps, hp.user_steps)
    both = (hp.alignment_steps > 0) & (hp.user_steps > 0)
    ends = both & (ctx.step > 0) & (state.clock >= length)
    return Memory(
        aligning=was ^ ends,
        clock=jnp.where(ends, 0, state.clock),
        w_alignment=_select(ends & was, params, state.w_alignment),
        w_user=_select(ends & ~was, params, state.w_user),
    )


def direction(ctx, params, batches, rng, state: Memory):
    hp, state = ctx.hp, advance(ctx, params, state)
    batch = _select(state.aligning, batches["alignment"], batches["user"])
    loss, grads = jax.value_and_grad(ctx.loss)(params, batch, rng)
    anchor = _select(state.aligning, state.w_user, state.w_alignment)
    drift = optax.tree.sub(params, anchor)
    proximal = ctx.step > jnp.floor(hp.free_ratio * ctx.steps + _ROUNDING)
    # The gradient of rho / 2 ||w - anchor||^2, which is finite at the anchor itself.
    grads = tree.add_scale(grads, jnp.where(proximal, hp.rho, 0.0), drift)
    return (
        grads,
        {
            "loss/batch": loss,
            "state/alignment": state.aligning.astype(jnp.float32),
            "norm/drift": tree.norm(drift),
        },
        state.replace(clock=state.clock + 1),
    )


def _select(first: jax.Array, a, b):
    """`a` where the scalar `first` holds, else `b`, leafwise."""
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, streams, memory)


_CODE = Hparams(
    optimizers.Optimizer(1e-5),
    adapters.LoRA(alpha=4.0, dropout=0.1, rank=8, targets=("q", "v")),
)


def _elsewhere(learning_rate: float, rho: float, source: str) -> plans.Plan:
    optimizer = _CODE.optimizer.replace(learning_rate=learning_rate)
    hp = _CODE.replace(optimizer=optimizer, rho=rho)
    return plans.Plan(hp, batch_size=5, epochs=20, source=source)


PRESETS = {
    # 10 and 40 of 192 steps where the code has 100 and 900 of 20 epochs; rho is a tenth
    # of its.
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX_TUNING, alignment_steps=10, user_steps=40, rho=0.1)
    ),
    "code": plans.Plan(
        _CODE, batch_size=5, epochs=20, source="git-disl/Lisa 68e3659, scripts"
    ),
    # Of the repositories that compare with it.
    "booster_repo": _elsewhere(1e-5, 0.01, "git-disl/Booster"),
    "antidote_sst2": _elsewhere(1e-4, 1.0, "git-disl/Antidote 26e2ade"),
    "antidote_gsm8k": _elsewhere(1e-3, 0.1, "git-disl/Antidote 26e2ade"),
}
