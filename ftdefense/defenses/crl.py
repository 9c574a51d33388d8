"""CRL (Triplet): gather harmful hidden states, away from where they and benign ones are.

Stage        alignment; starts from an aligned chat model.
Starts from  aligned
Template     T2 purge
Strategy     anchoring
Minimises    alpha * mean relu(d(b0, b) - d(b, c) + margin_benign)
             + beta * mean relu(d(h, c) - d(h, h0) + margin_harmful)
             + gamma * KL(p0 || p) on benign texts, with d = 1 - cos; b, h the hidden
             states at answer tokens of benign and harmful texts, b0, h0 and p0 those of
             the frozen model; c the mean of h in a layer: a gradient passes through it.
             Means are over layers and answer tokens; KL over all real tokens.
Source       Simko et al. 2025, "Improving Large Language Model Safety with Contrastive
             Representation Learning"; code read at criticalml-uw/TamperBench 9ca195b,
             defenses/crl (specs: unlearning_and_traps 13).
Evidence     3P: a re-implementation, which the authors of the method advised. The paper's
             margins, 500 and 1500, are those of its own distance, which mixes in L2.
Licence      MIT, of TamperBench; rewritten from the formulas.
Differs      from the paper, as TamperBench does: distance, margins, no adversarial hard
             negatives. Hidden states and KL share one pass, so one dropout mask.
Reduces to   the KL term at alpha = beta = 0, whose gradient is 0 at the start.
Cost         4 forwards, 2 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import microbatching
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import depths
from ftdefense.objectives import distances
from ftdefense.objectives import divergences
from ftdefense.objectives import lens

STARTS_FROM = "aligned"
PUBLISHED = tuple(range(20, 32))  # Of 32 layers; see `depths.hidden_states`.
NULL = {"alpha": 0.0, "beta": 0.0}  # Without its regulariser; see attacks.inverse.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    alpha: float = 0.5  # Weight of the benign triplets.
    beta: float = 0.4  # Weight of the harmful triplets.
    gamma: float = 0.9  # Weight of the divergence.
    margin_benign: float = 0.3  # Of cosine distances, 0 to 2.
    margin_harmful: float = 0.5  # Of cosine distances, 0 to 2.
    # Hidden states to read; (): those published, at this depth.
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    microbatching.refuse(hp, "crl")
    return {"benign": (), "harmful": ()}


def mean(x_SxBxL: jax.Array, weights_BxL: jax.Array) -> jax.Array:
    """Mean over layers and weighted tokens."""
    total = x_SxBxL.shape[0] * jnp.maximum(jnp.sum(weights_BxL), 1)
    return jnp.sum(x_SxBxL * weights_BxL[None]) / total


def centroid(states_SxBxLxD: jax.Array, weights_BxL: jax.Array) -> jax.Array:
    """Mean hidden state of each layer, [S, 1, 1, D]."""
    weights_1xBxLx1 = weights_BxL[None, ..., None]
    total = jnp.maximum(jnp.sum(weights_BxL), 1)
    summed = jnp.sum(states_SxBxLxD * weights_1xBxLx1, (1, 2), keepdims=True)
    return summed / total


def triplet(near: jax.Array, far: jax.Array, margin: float | jax.Array) -> jax.Array:
    """`relu(d(near) - d(far) + margin)` of two cosines, d = 1 - cos."""
    return jax.nn.relu((1 - near) - (1 - far) + margin)


def direction(ctx, params, batches, rng):
    hp, benign, harmful = ctx.hp, batches["benign"], batches["harmful"]
    rng_benign, rng_harmful = jax.random.split(rng)
    blocks = depths.count(ctx.reference, benign.tokens)
    at = jnp.asarray(depths.hidden_states(hp.layers, PUBLISHED, blocks))

    def states(outputs):
        return tree.wide(lens.hidden_states(outputs)[at])

    benign_start = jax.lax.stop_gradient(ctx.reference(benign.tokens))
    harmful_start = jax.lax.stop_gradient(ctx.reference(harmful.tokens))
    b0_SxBxLxD, h0_SxBxLxD = states(benign_start), states(harmful_start)

    def loss(w):
        benign_now = ctx.model(w, benign.tokens, rng=rng_benign)
        b_SxBxLxD = states(benign_now)
        h_SxBxLxD = states(ctx.model(w, harmful.tokens, rng=rng_harmful))
        c_Sx1x1xD = centroid(h_SxBxLxD, harmful.weights)
        kept_SxBxL = triplet(
            distances.cosine(b0_SxBxLxD, b_SxBxLxD),
            distances.cosine(b_SxBxLxD, c_Sx1x1xD),
            hp.margin_benign,
        )
        moved_SxBxL = triplet(
            distances.cosine(h_SxBxLxD, c_Sx1x1xD),
            distances.cosine(h_SxBxLxD, h0_SxBxLxD),
            hp.margin_harmful,
        )
        nats_BxL = divergences.kullback_leibler(benign_start.logits, benign_now.logits)
        metrics = {
            "triplet/benign": mean(kept_SxBxL, benign.weights),
            "triplet/harmful": mean(moved_SxBxL, harmful.weights),
            "divergence/benign": mean(nats_BxL[None], distances.attended(benign)),
        }
        scales = (hp.alpha, hp.beta, hp.gamma)
        terms = zip(scales, metrics.values(), strict=True)
        return sum(scale * term for scale, term in terms), metrics

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX.replace(learning_rate=1e-4)),
        steps=200,
    ),
    "tamperbench": plans.Plan(
        Hparams(
            optimizers.Optimizer(1e-5, weight_decay=0.01),
            adapters.LoRA(alpha=16.0, dropout=0.05, rank=16),
        ),
        batch_size=16,
        steps=1100,
        source="criticalml-uw/TamperBench 9ca195b, defenses/crl/config.py",
    ),
}
