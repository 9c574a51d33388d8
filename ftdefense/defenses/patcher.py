"""Patcher: refuse with and without the displacement of a long simulated attack.

Stage        alignment.
Template     T3 look-ahead
Strategy     anchoring
Minimises    (1 - alpha) * L(alignment; w) + alpha * L(alignment; w + v), over phases of
             `defend_steps` steps of a fresh AdamW; v = phi - w is constant in a phase:
             from the w where it begins, phi takes `attack_steps` steps of a fresh
             AdamW on the harmful loss. In the first phase v = 0.
Source       Wen et al. 2026, arXiv:2606.07970; code read at haomingwen/patcher 084e7e3
             (specs: perturbation_and_meta 4.3).
Evidence     CODE for the rule and the defaults; UNVERIFIED: the paper's body.
Licence      no licence file found; rewritten from the formulas.
Differs      sequential form only; the attack takes the first `attack_rows` of a batch's
             rows. v and w + v are float32. The schedule, constant in the code, runs over
             the defender's steps. The rows of the role `alignment` may hold benign pairs;
             the paper's are refusals.
Reduces to   SFT on the alignment data at alpha = 0 or attack_steps = 0, exactly, with
             the optimizer restarted at every phase.
Cost         2 forwards, 2 backwards a defender step, and 1, 1 an attack step. One step
             of the method is a phase. The first phase attacks nobody: its loss/harmful
             is 0.
"""

from flax import struct
import jax
import optax

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import alternating
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import phases
from ftdefense.methods import plans


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    alpha: float = 0.5  # Share of the loss under attack.
    attack_rate: float = 1e-5  # Learning rate of the simulated attack, constant.
    attack_steps: int = struct.field(pytree_node=False, default=300)  # k1.
    attack_rows: int = struct.field(pytree_node=False, default=0)  # Of a batch; 0: all.
    defend_steps: int = struct.field(pytree_node=False, default=1000)  # k2.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    attack = {"harmful": (hp.attack_steps,)} if hp.attack_steps else {}
    return {"alignment": (hp.defend_steps,), **attack}


def attack_vector(ctx, params, batches_K, rng):
    """(phi - params in float32, metrics) after the attack's K steps from `params`."""
    hp = ctx.hp
    start = tree.wide(params)
    if not hp.attack_steps:
        return optax.tree.zeros_like(start), {}

    def gradient(phi, x):
        batch, rng = x
        value, grads = jax.value_and_grad(ctx.loss)(phi, batch, rng)
        return grads, {"loss/harmful": value}

    attacker = alternating.constant(hp.optimizer, hp.attack_rate, hp.attack_steps)
    if hp.attack_rows:
        batches_K = jax.tree.map(lambda x: x[:, : hp.attack_rows], batches_K)
    xs = batches_K, jax.random.split(rng, hp.attack_steps)
    phi, metrics, _ = alternating.descend(attacker, start, gradient, xs)
    return tree.add_scale(phi, -1.0, start), {"loss/harmful": metrics["loss/harmful"]}


def direction(ctx, params, batches, rng, vector):
    """One defender step's gradient; `vector` is constant."""
    batch = batches["alignment"]
    rng_clean, rng_attacked = jax.random.split(rng)
    clean, grads = jax.value_and_grad(ctx.loss)(params, batch, rng_clean)
    attacked = tree.add_scale(tree.wide(params), 1.0, jax.lax.stop_gradient(vector))
    after, grads_after = jax.value_and_grad(ctx.loss)(attacked, batch, rng_attacked)
    # Not a sum of two shares: where both gradients agree, it is exactly theirs.
    grads = tree.add_scale(grads, ctx.hp.alpha, optax.tree.sub(grads_after, grads))
    return grads, {"loss/alignment": clean, "loss/attacked": after}


def phase(ctx, params, batches, rng, memory):
    hp = ctx.hp
    rng_attack, rng_defend = jax.random.split(rng)
    vector, attacked = phases.only_if(
        ctx.step > 0,
        lambda: attack_vector(ctx, params, batches.get("harmful"), rng_attack),
    )

    def gradient(params, x):
        batch, rng = x
        return direction(ctx, params, {"alignment": batch}, rng, vector)

    defender = alternating.restarted(hp.optimizer, hp.defend_steps, ctx.step)
    xs = batches["alignment"], jax.random.split(rng_defend, hp.defend_steps)
    params, metrics, _ = alternating.descend(defender, params, gradient, xs)
    return params, {**metrics, **attacked, "norm/vector": tree.norm(vector)}, memory


def method(model: types.Model) -> types.Method:
    return alternating.phased_method(model, phase, streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(
            optimizers.SANDBOX_ALIGNMENT,
            alpha=0.5,
            attack_rate=1e-4,
            attack_steps=30,
            defend_steps=30,
        ),
        steps=20,
    ),
    "code": plans.Plan(
        Hparams(
            optimizers.Optimizer(1e-5, weight_decay=0.01, decay_all=True),
            attack_rows=2,
        ),
        batch_size=4,
        steps=15,
        source="haomingwen/patcher 084e7e3, scripts/run_patch_iter_final.sh",
    ),
}
