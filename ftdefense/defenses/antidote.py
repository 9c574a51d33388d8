"""AntiDote: prefer refusals under patches that a network learns to write against them.

Stage        alignment; not the pruning method of the same name.
Starts from  aligned
Template     T3 look-ahead
Strategy     anchoring
Minimises    in turn, for k steps each. Adversary, over phi: P(harmful over refusal) of
             w + V U. Defender, over w: lam * P(refusal over harmful) of w + V U +
             lam_retain * CE(benign; w) + lam_kl * KL(reference || w; benign), the KL
             after every token, prompts included. (U, V) = phi(what the patched kernels
             of w read on the harmful rows), constant for the defender, one pair a layer
             and kernel. P is the mean of (D - 1 / (2 beta))^2, D the difference of
             sequence log-ratios to the reference: the model where the stage starts.
Source       Sanyal et al. 2025, arXiv:2509.08000; code read at respailab/Antidote
             b7809d1, and at 6e12f6a for the specs (perturbation_and_meta 5.5).
Evidence     RECONSTRUCTION of the game from the paper as the specs read it: in the code
             no gradient reaches phi, its norm is not clipped, and the defender's pair
             is swapped. CODE for the network, P, the weights and the preset;
             UNVERIFIED: the paper's own numbers, the size of its data.
Licence      none declared: rewritten from formulas.
Differs      the network's feed-forward blocks, which b7809d1 builds and does not call,
             are called. The adversary's norm is clipped to 1. KL, not cross-entropy
             (equal gradients). LoRA leaves embeddings and norms alone. Weight decay
             spares biases and norm scales.
Reduces to   SFT on the benign rows at lam = lam_kl = 0, lam_retain = 1; training without
             an adversary at scale = 0.
Cost         8 forwards, 3 backwards a pair of steps, of the adversary and the defender:
             2 of what the kernels read, 3 of the reference. One step of the method is k
             of either.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import alternating
from ftdefense.methods import hypernetwork
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import patches
from ftdefense.methods import plans
from ftdefense.objectives import distances
from ftdefense.objectives import divergences
from ftdefense.objectives import losses
from ftdefense.objectives import parts
from ftdefense.objectives import preferences

STARTS_FROM = "aligned"
PREFERENCES = {"ipo": preferences.ipo, "dpo": preferences.dpo}


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced; the shapes of the game and of the network are static."""

    lam: float = 1.0  # Weight of the preference under the patch.
    lam_retain: float = 0.8  # Weight of the benign cross-entropy.
    lam_kl: float = 0.3  # Weight of the divergence from the reference.
    beta: float = 0.1  # Inverse temperature, per nat.
    scale: float = 1.0  # Of the patch.
    attack_rate: float = 2e-7  # Learning rate of the adversary, constant.
    attack_clip: float = 1.0  # Largest norm of its gradient.
    dropout: float = 0.1  # In the adversary, while it trains.
    block_steps: int = struct.field(pytree_node=False, default=2000)  # k.
    rank: int = struct.field(pytree_node=False, default=8)
    width: int = struct.field(pytree_node=False, default=1024)  # Of the adversary.
    heads: int = struct.field(pytree_node=False, default=16)
    targets: tuple[str, ...] = struct.field(
        pytree_node=False, default=(*adapters.ATTENTION, "o")
    )
    preference: str = struct.field(pytree_node=False, default="ipo")  # Or "dpo".


@struct.dataclass
class Memory:
    """The adversary, and what both optimizers remember from block to block."""

    phi: types.Params
    adversary: Any
    defender: Any


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    """Of the pairs, the first k batches are the adversary's."""
    if hp.preference not in PREFERENCES:
        raise errors.unknown("preference", hp.preference, PREFERENCES)
    if hp.width % hp.heads:
        raise errors.UserError(
            f"width={hp.width} is no multiple of heads={hp.heads}; change one of them."
        )
    adapters.all_blocks(hp.adapter, "antidote")
    pairs = (2, hp.block_steps)
    return {"harmful": pairs, "refusal": pairs, "benign": (hp.block_steps,)}


def memory(ctx, params, rng):
    hp, base = ctx.hp, ctx.lineage.current
    paths = patches.find(base, hp.targets)
    phi = hypernetwork.init(rng, base, paths, hp.rank, hp.width)
    transform = hp.optimizer.transform()
    return Memory(phi, transform.init(phi), transform.init(params))


def phase(read, ctx, params, batches, rng, memory):
    """A block of either side; `read(params, tokens, rng=None)`: what all kernels read."""
    hp = ctx.hp
    pairs = {role: batches[role] for role in ("harmful", "refusal")}
    first, second = (jax.tree.map(lambda x, i=i: x[i], pairs) for i in range(2))
    rng_attack, rng_defend = jax.random.split(rng, (2, hp.block_steps))

    def attack(phi, xs):
        pair, rng = xs
        inputs = read(params, pair["harmful"].tokens)
        return adversary_direction(ctx, params, pair, rng, phi, inputs)

    adversary = alternating.constant(
        hp.optimizer.replace(clip=hp.attack_clip),
        hp.attack_rate,
        ctx.steps * hp.block_steps,
    )
    phi, attacked, opt_adversary = alternating.descend(
        adversary, memory.phi, attack, (first, rng_attack), memory.adversary
    )

    def defend(params, xs):
        batch, rng = xs
        # As in the code, what is read here has the dropout of an adapter that trains.
        rng_read = jax.random.fold_in(rng, 2)
        inputs = read(params, batch["harmful"].tokens, rng=rng_read)
        patch = write(ctx, phi, inputs)
        return direction(ctx, params, batch, rng, patch)

    defender = alternating.stretched(hp.optimizer, hp.block_steps)
    xs = {**second, "benign": batches["benign"]}, rng_defend
    params, metrics, opt_defender = alternating.descend(
        defender, params, defend, xs, memory.defender
    )
    metrics = {
        **metrics,
        "loss/adversary": attacked["loss/adversary"],
        "norm/adversary": attacked["norm/gradient"],
    }
    return params, metrics, Memory(phi, opt_adversary, opt_defender)


def write(ctx, phi, inputs, rng=None):
    """The patch for constant `inputs`; `rng` where the adversary trains."""
    hp, inputs = ctx.hp, jax.lax.stop_gradient(inputs)
    paths = patches.find(ctx.lineage.current, hp.targets)
    patch = hypernetwork.write(phi, inputs, paths, hp.heads, rng, hp.dropout)
    return patches.scaled(patch, hp.scale)


def adversary_direction(ctx, params, pair, rng, phi, inputs):
    def loss(phi):
        model = patches.apply(ctx, params, write(ctx, phi, inputs, rng))
        return preference(ctx, model, pair["harmful"], pair["refusal"])

    value, grads = jax.value_and_grad(loss)(phi)
    return grads, {"loss/adversary": value}


def direction(ctx, params, batches, rng, patch):
    """The defender's; `patch` is constant."""
    hp, patch = ctx.hp, jax.lax.stop_gradient(patch)
    rng_attacked, rng_benign = jax.random.split(rng)

    def loss(params):
        model = patches.apply(ctx, params, patch)
        attacked = preference(
            ctx, model, batches["refusal"], batches["harmful"], rng_attacked
        )
        nats, kl = retained(ctx, params, batches["benign"], rng_benign)
        total = hp.lam * attacked + hp.lam_retain * nats + hp.lam_kl * kl
        return total, {
            "loss/attacked": attacked,
            "loss/benign": nats,
            "divergence/benign": kl,
        }

    return jax.grad(loss, has_aux=True)(params)


def preference(ctx, model, chosen, rejected, rng=None):
    """Mean loss of a `model(tokens, rng=None)` that is to prefer `chosen`."""
    loss = PREFERENCES[ctx.hp.preference]
    preferences.check_pairs(chosen, rejected)

    def compute(pair, rng):
        both = jax.tree.map(lambda *x: jnp.concatenate(x), *pair)
        logps_2B, _ = preferences.sequence_logps(model(both.tokens, rng=rng), both)
        start = jax.lax.stop_gradient(ctx.reference(both.tokens))
        start_2B, _ = preferences.sequence_logps(start, both)
        s_chosen, s_rejected = (logps_2B - start_2B).reshape(2, -1)
        return jnp.sum(loss(s_chosen, s_rejected, ctx.hp.beta))

    total = parts.summed(compute, (chosen, rejected), ctx.hp.microbatches, rng)
    return total / chosen.tokens.shape[0]


def retained(ctx, params, batch, rng):
    """(CE of the answers, KL(reference || model) after every token), of one pass."""

    def compute(batch, rng):
        outputs = ctx.model(params, batch.tokens, rng=rng)
        start = jax.lax.stop_gradient(ctx.reference(batch.tokens))
        kl_BxL = divergences.kullback_leibler(start.logits, outputs.logits)
        real_BxL = distances.attended(batch).astype(kl_BxL.dtype)
        total, weight = losses.weighted_sums(outputs, batch)
        return total, jnp.sum(kl_BxL * real_BxL), weight, jnp.sum(real_BxL)

    *totals, weight, count = parts.summed(compute, batch, ctx.hp.microbatches, rng)
    return [
        losses.average(total, size)
        for total, size in zip(totals, (weight, count), strict=True)
    ]


def method(model: types.Model) -> types.Method:
    def step(ctx, params, batches, rng, memory):
        read = ctx.hp.adapter.bind(model.inputs, ctx.lineage.current)
        return phase(read, ctx, params, batches, rng, memory)

    return alternating.phased_method(model, step, streams, memory)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(
            optimizers.SANDBOX.replace(learning_rate=3e-5),
            lam=0.02,  # Untuned. At 1 the capability of the tiny model fell to 0.
            scale=0.3,  # At 1 the first patch raised the loss of a toy from 25 to 900.
            attack_rate=1e-3,
            block_steps=5,
            width=32,
            heads=4,
            targets=adapters.PROJECTIONS,
        ),
        batch_size=32,  # The adversary attends over all tokens of a batch, squared.
        steps=60,
    ),
    "code": plans.Plan(
        Hparams(
            optimizers.Optimizer(3e-5, clip=float("inf"), weight_decay=0.01),
            adapters.LoRA(alpha=32.0, dropout=0.1, rank=16),
        ),
        batch_size=2,
        steps=3,  # Epochs, of as many blocks as the data fill: one, if 4000 to 7999 rows.
        source="respailab/Antidote 6e12f6a, training.py",
    ),
}
