"""LAT: refuse, whatever an attacker who wants this very answer adds to hidden states.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     none
Strategy     anchoring
Minimises    (toward * CE(refusal; w, e) + away * U(harmful; w, e) + keep * K(benign; w))
             / (toward + away + keep), `updates` AdamW updates a step under one constant
             e, with U the mean of -log(1 - p), 0 at tokens with log p < -5. K is the
             cross-entropy (`benign` = "sft"), or D / (sg(D) + 1e-8) ("kl") with
             D = KL(p_w || p_0) / V at the positions of answer tokens. e shifts, at prompt
             tokens (`answers`: and answers), the embeddings and the MLP outputs of some
             blocks: 0 at first, `inner_steps` of AdamW on CE(harmful) + U(refusal),
             weighted alike, each cut to L2 length `epsilon` at every site and token.
Source       Sheshadri et al. 2024, arXiv:2407.15549; code read at
             aengusl/latent-adversarial-training 53ac752 (specs: unlearning_and_traps 8).
Evidence     CODE, of the jailbreak setting; the unlearning ones are not here.
Licence      MIT; rewritten from the formulas.
Differs      one attack on the whole batch, and means over it: the code attacks parts of
             2 rows and sums their losses. Its LoRA leaves out the gate, as ours does.
Reduces to   toward, away and K without a shift at epsilon = 0; with toward = away = 0
             and updates = 1 to SFT on benign.
Cost         44 forwards, 44 backwards: 2 of each an inner step, 3 an update; 1 forward
             more with "kl".
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import latents
from ftdefense.methods import lift
from ftdefense.methods import microbatching
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import depths
from ftdefense.objectives import distances
from ftdefense.objectives import divergences
from ftdefense.objectives import losses
from ftdefense.objectives import unlikelihood

STARTS_FROM = "aligned"
PUBLISHED = (8, 16, 24, 30)  # Blocks, of 32; see `depths.block_indices`.
BENIGN = ("sft", "kl")
NULL = {"toward": 0.0, "away": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    epsilon: float = 6.0  # L2 length of a shift, at each site and token.
    inner_rate: float = 5e-2  # Learning rate of the attack.
    inner_decay: float = 0.01  # Weight decay of the attack: PyTorch's default.
    inner_toward: float = 0.5  # The attack's weight of the harmful answer.
    inner_away: float = 0.5  # The attack's weight against the refusal.
    toward: float = 0.5  # Weight of the refusal.
    away: float = 0.5  # Weight against the harmful answer.
    keep: float = 1.5  # Weight of the benign term.
    inner_steps: int = struct.field(pytree_node=False, default=16)
    updates: int = struct.field(pytree_node=False, default=4)  # A step, at least 1.
    restart: bool = struct.field(pytree_node=False, default=True)  # AdamW, each step.
    benign: str = struct.field(pytree_node=False, default="sft")
    embedding: bool = struct.field(pytree_node=False, default=True)  # Shifted, too.
    answers: bool = struct.field(pytree_node=False, default=False)  # Shifted, too.
    # Blocks to attack; (): those published, at this depth.
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    microbatching.refuse(hp, "lat")
    if hp.benign not in BENIGN:
        raise errors.unknown("benign term", hp.benign, BENIGN)
    if hp.updates < 1:
        raise errors.UserError(f"lat: updates={hp.updates}; give at least 1.")
    return {"harmful": (), "refusal": (), "benign": ()}


def attacked(batches, answers: bool) -> jax.Array:
    """1 at the prompts of the pairs, and at either's answers if they count; [B, L]."""
    answer_BxL = batches["harmful"].weights > 0
    seen_BxL = jax.lax.cummax(answer_BxL.astype(jnp.int32), axis=1)
    mask_BxL = seen_BxL == 0
    if answers:
        mask_BxL |= answer_BxL | (batches["refusal"].weights > 0)
    return mask_BxL.astype(jnp.float32)


def terms(ctx, wanted, unwanted, hooks, rng):
    """Losses of (params): (cross-entropy of `wanted`, unlikelihood of `unwanted`)."""
    rng_wanted, rng_unwanted = jax.random.split(rng)
    avoid = losses.next_token(ctx.model, unlikelihood.unlikelihood)

    def compute(w):
        say = ctx.loss(w, wanted, rng_wanted, **hooks)
        return say, avoid(w, unwanted, rng_unwanted, **hooks)

    return compute


def attack(ctx, params, batches, rng):
    """The hooks of a model under attack, and the mean length of the shifts."""
    hp, harmful, refusal = ctx.hp, batches["harmful"], batches["refusal"]
    hidden = jax.eval_shape(ctx.model, params, harmful.tokens).hidden
    blocks, *shape = hidden["mlp"].shape
    layers = depths.block_indices(hp.layers, PUBLISHED, blocks)
    wide = jnp.promote_types(hidden["mlp"].dtype, jnp.float32)
    start = {"mlp": jnp.zeros((len(layers), *shape), wide)}
    if hp.embedding:
        start["embed"] = jnp.zeros(shape, wide)
    mask_BxL = attacked(batches, hp.answers)

    def loss(shifts, rng):
        hooks = latents.hooks(shifts, mask_BxL, layers, blocks)
        say, avoid = terms(ctx, harmful, refusal, hooks, rng)(params)
        total = hp.inner_toward + hp.inner_away
        return (hp.inner_toward * say + hp.inner_away * avoid) / total

    shifts = latents.descend(
        loss,
        start,
        rng,
        steps=hp.inner_steps,
        rate=hp.inner_rate,
        decay=hp.inner_decay,
        radius=hp.epsilon,
    )
    lengths_SxBxL = distances.norm(shifts["mlp"])
    count = jnp.maximum(jnp.sum(mask_BxL), 1) * len(layers)
    hooks = latents.hooks(shifts, mask_BxL, layers, blocks)
    return hooks, jnp.sum(lengths_SxBxL) / count


def divergence(ctx, params, benign, start_BxLxV, rng):
    """KL(p_w || p_0) per element, read at the answer tokens' own positions."""
    logits_BxLxV = ctx.model(params, benign.tokens, rng=rng).logits
    nats_BxL = divergences.kullback_leibler(logits_BxLxV, start_BxLxV)
    count = jnp.maximum(jnp.sum(benign.weights), 1) * logits_BxLxV.shape[-1]
    return jnp.sum(nats_BxL * benign.weights) / count


def start_logits(ctx, batches):
    """Logits where the stage started, for "kl"."""
    if ctx.hp.benign != "kl":
        return None
    return jax.lax.stop_gradient(ctx.reference(batches["benign"].tokens).logits)


def defend(ctx, params, batches, hooks, start_BxLxV, rng):
    """Gradient of the weighted terms under the hooks of an attack."""
    hp, benign = ctx.hp, batches["benign"]
    rng_pair, rng_benign = jax.random.split(rng)
    pair = terms(ctx, batches["refusal"], batches["harmful"], hooks, rng_pair)

    def loss(w):
        say, avoid = pair(w)
        metrics = {"loss/refusal": say, "unlikelihood/harmful": avoid}
        if hp.benign == "sft":
            kept = metrics["loss/benign"] = ctx.loss(w, benign, rng_benign)
        else:
            drift = divergence(ctx, w, benign, start_BxLxV, rng_benign)
            metrics["divergence/benign"] = drift * start_BxLxV.shape[-1]
            # At the start both are rounding, and their ratio would be noise of length 1.
            moved = drift * start_BxLxV.shape[-1] > 1e-6
            kept = jnp.where(moved, drift / (jax.lax.stop_gradient(drift) + 1e-8), 0)
        total = hp.toward * say + hp.away * avoid + hp.keep * kept
        return total / (hp.toward + hp.away + hp.keep), metrics

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics


def direction(ctx, params, batches, rng):
    """Attack, then the gradient of the first update."""
    rng_attack, rng_defend = jax.random.split(rng)
    hooks, length = attack(ctx, params, batches, rng_attack)
    start_BxLxV = start_logits(ctx, batches)
    grads, metrics = defend(ctx, params, batches, hooks, start_BxLxV, rng_defend)
    return grads, {**metrics, "norm/latents": length}


def method(model: types.Model) -> types.Method:
    def init(lineage, hp, rng):
        return lift.init_state(hp.adapter.init(lineage.current, rng), hp)

    def step(state, lineage, batches, rng):
        hp = state.hp
        ctx = lift.context(model, lineage, hp, state.step)
        rng_attack, rng_defend = jax.random.split(rng)
        hooks, length = attack(ctx, state.params, batches, rng_attack)
        start_BxLxV = start_logits(ctx, batches)
        # All updates of a step at its learning rate, however AdamW counts them.
        table = hp.optimizer.schedule
        rate = jnp.full_like(table, table[state.step])
        held = hp.replace(optimizer=hp.optimizer.replace(schedule=rate))
        inner = state.replace(hp=held)
        if hp.restart:
            inner = lift.init_state(state.params, held)

        def update(inner, rng):
            grads, metrics = defend(ctx, inner.params, batches, hooks, start_BxLxV, rng)
            inner, norms = lift.descend(inner, grads)
            return inner, {**metrics, **norms}

        rngs = jax.random.split(rng_defend, hp.updates)
        inner, metrics = jax.lax.scan(update, inner, rngs)
        state = inner.replace(hp=hp, step=state.step + 1)
        last = jax.tree.map(lambda x: x[-1], metrics)
        return state, {**last, "norm/latents": length}

    def release(state, lineage):
        return types.Release(state.hp.adapter.merge(state.params, lineage.current))

    return types.Method(streams, init, step, release)


_LORA = adapters.LoRA(alpha=8.0, rank=64, targets=("q", "k", "v", "o", "up", "down"))

PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(
            optimizers.SANDBOX, epsilon=1.0, inner_steps=8, updates=1, restart=False
        ),
        steps=100,
        batch_size=64,
    ),
    "code": plans.Plan(
        Hparams(optimizers.Optimizer(2e-5, weight_decay=0.01), _LORA),
        batch_size=16,
        steps=100,
        source="aengusl/latent-adversarial-training 53ac752, jailbreaks.ipynb, Llama-2",
    ),
    "code_llama3": plans.Plan(
        Hparams(
            optimizers.Optimizer(8e-5, weight_decay=0.01),
            _LORA,
            inner_rate=1e-3,
            keep=0.1,
            benign="kl",
            answers=True,
        ),
        batch_size=16,
        steps=100,
        source="aengusl/latent-adversarial-training 53ac752, jailbreaks.ipynb, Llama-3",
    ),
}
