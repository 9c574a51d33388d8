"""RMU: steer the states of harmful texts to one random vector, and keep the others.

Stage        alignment; unlearning before release.
Starts from  aligned
Template     T2 purge
Strategy     anchoring
Minimises    mean (h(x_f; w) - c * u / ||u||)^2 + alpha * mean (h(x_r; w) - h(x_r; w_0))^2
             over rows, all positions with their padding, and width: h the output of
             block `layer`, x_f harmful and x_r benign texts, u uniform on [0, 1) and
             drawn once, w_0 the weights at the start of the stage. Only the MLP's down
             projections of blocks layer - 2 .. layer train.
Source       Li et al. 2024, arXiv:2403.03218; code read at centerforaisafety/wmdp
             c0b6c12, rmu/unlearn.py (specs: defenses_unlearning_and_traps 6).
Evidence     CODE. UNVERIFIED: which AdamW the runs had; here with transformers' numbers
             (eps 1e-6, no decay), which PyTorch's (1e-8, 0.01) replaced.
Licence      MIT
Differs      AdamW divides by sqrt(v^) + eps, as PyTorch's; transformers' adds eps before
             it corrects v: by sqrt(v^) + eps / sqrt(1 - b2^t). One topic, hence one
             vector, which is drawn in float32; padding on the right, which sees earlier
             padding. A model with too few blocks takes its last one. An adapter names
             its own modules: its factors in these blocks train.
Reduces to   nothing moves where harmful states are at the vector already; at w_0 the
             second term is 0, with gradient 0; with large alpha it holds w at w_0.
Cost         3 forwards, 2 backwards.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import distances
from ftdefense.objectives import parts

STARTS_FROM = "aligned"
BLOCKS = 3  # That train: `layer` and those before it.


@struct.dataclass
class Hparams(lift.Hparams):
    """Numbers may be traced. The optimizer passes over what does not train."""

    optimizer: optimizers.Optimizer = optimizers.Optimizer(kind="adamw_by_leaf")
    c: float = 6.5  # Length of the vector that harmful states are steered to, L2.
    alpha: float = 1200.0  # Weight of the distance of benign states.
    layer: int = struct.field(pytree_node=False, default=7)  # Block, from 0.


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.layer < 0:
        raise errors.UserError(f"rmu.layer={hp.layer}: give a block's index, from 0.")
    adapters.all_blocks(hp.adapter, "rmu")
    return {"harmful": (), "benign": ()}


def states(outputs: types.Outputs, layer: int) -> jax.Array:
    """Residual stream [B, L, D] after block `layer`, or after the last one."""
    resid_NxBxLxD = outputs.hidden["resid"]
    return tree.wide(resid_NxBxLxD[min(layer, resid_NxBxLxD.shape[0] - 1)])


def active(ctx, params, memory=None):
    """Masks of what trains, which broadcast to the leaves."""
    del memory

    def mask(path, leaf):
        *above, module, kind = tree.path_names(path)
        adapted = kind in ("a", "b")
        if "layers" not in above or not (
            adapted or (module, kind) == ("down", "kernel")
        ):
            return np.zeros((1,) * leaf.ndim, bool)
        blocks = leaf.shape[0]
        last = min(ctx.hp.layer, blocks - 1)
        index = np.arange(blocks)
        on = (index > last - BLOCKS) & (index <= last)
        return on.reshape(-1, *(1,) * (leaf.ndim - 1))

    masks = jax.tree_util.tree_map_with_path(mask, params)
    if not any(m.any() for m in jax.tree.leaves(masks)):
        raise errors.UserError(
            "rmu: no down projection, or adapter of blocks, to train."
        )
    return masks


def remember(ctx, params, rng) -> jax.Array:
    """The direction u / ||u||, [D]: of positive entries, uniform before the division."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    width = jax.eval_shape(ctx.model, params, tokens).hidden["resid"].shape[-1]
    u_D = jax.random.uniform(rng, (width,), jnp.float32)
    return u_D / jnp.linalg.norm(u_D)


def direction(ctx, params, batches, rng, memory):
    hp = ctx.hp
    rng_harmful, rng_benign = jax.random.split(rng)
    vector_1x1xD = hp.c * memory[None, None]
    masks = active(ctx, params)

    def distance(w, batch, rng, target):
        def summed(rows, rng):
            seen = distances.attended(rows)
            outputs = ctx.model(w, rows.tokens, rng=rng, attended=seen)
            here_BxLxD = states(outputs, hp.layer)
            there = jax.lax.stop_gradient(target(rows.tokens, seen))
            return jnp.sum(jnp.mean(jnp.square(here_BxLxD - there), (1, 2)))

        total = parts.summed(summed, batch, hp.microbatches, rng)
        return total / batch.tokens.shape[0]

    def at_first(tokens, seen):
        return states(ctx.reference(tokens, attended=seen), hp.layer)

    def loss(params):
        w = jax.tree.map(_only, params, masks)
        far = distance(w, batches["harmful"], rng_harmful, lambda *_: vector_1x1xD)
        drift = distance(w, batches["benign"], rng_benign, at_first)
        return far + hp.alpha * drift, (far, drift)

    (_, (far, drift)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, {"distance/harmful": far, "drift/benign": drift}, memory


def _only(leaf, mask):
    frozen = jax.lax.stop_gradient(leaf)
    return jnp.where(mask, leaf, frozen) if mask.any() else frozen


def method(model: types.Model) -> types.Method:
    return lift.remembering_method(model, direction, streams, remember, active)


def _published(steps: int, batch_size: int = 4, **fields) -> plans.Plan:
    optimizer = optimizers.Optimizer(
        5e-5, clip=float("inf"), eps=1e-6, kind="adamw_by_leaf"
    )
    return plans.Plan(
        Hparams(optimizer, **fields),
        batch_size=batch_size,
        steps=steps,
        source="centerforaisafety/wmdp c0b6c12, rmu/unlearn.py",
    )


PRESETS = {
    "sandbox": plans.sandbox(
        Hparams(optimizers.SANDBOX.replace(kind="adamw_by_leaf"), alpha=10.0, layer=1),
        steps=200,
    ),
    "code": _published(150),  # Zephyr-7B.
    "code_yi": _published(400, batch_size=2, layer=15, c=300.0, alpha=350.0),
    "code_defaults": _published(80, c=20.0, alpha=100.0),  # Of the command line.
}
