"""Which weights a behaviour rests on: SNIP, Wanda, and the outputs of kernels.

Source: Wei et al. 2024, arXiv:2402.05162 (specs/attacks.md B.12). All are sums over the
rows of a batch, so that they add up over batches; only answer positions count.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import world as worlds
from ftdefense.methods import edits
from ftdefense.methods import plans
from ftdefense.models import generate
from ftdefense.models import transformer

Sums = dict[edits.Path, jax.Array]
_ROUNDING = 1e-6  # Shares of entries are counted in float32.


def snip(
    loss: Callable[..., jax.Array],
    params: types.Params,
    batch: types.Batch,
    targets: tuple[str, ...],
) -> Sums:
    """Sum over rows of |dL(row)/dW|, [N, I, O]: absolute before it is summed."""

    def add(sums, row):
        one = jax.tree.map(lambda x: x[None], row)
        grads = edits.kernels(jax.grad(loss)(params, one), targets)
        return {p: x + jnp.abs(tree.wide(grads[p])) for p, x in sums.items()}, None

    return jax.lax.scan(add, zeros(params, targets), batch)[0]


def zeros(params: types.Params, targets: tuple[str, ...]) -> Sums:
    return {p: tree.wide(0 * x) for p, x in edits.kernels(params, targets).items()}


def inputs(
    model: types.Model, params: types.Params, batch: types.Batch, targets: tuple
) -> Sums:
    """What the kernels read at answer positions, [N, T, I]; 0 at all others."""
    mask_BxL = batch.weights > 0
    found = jax.tree_util.tree_leaves_with_path(model.inputs(params, batch.tokens))
    read = {(*tree.path_names(path)[:-1], "kernel"): x for path, x in found}

    def at_answers(x_NxBxLxI):
        kept = jnp.where(mask_BxL[None, ..., None], tree.wide(x_NxBxLxI), 0)
        return kept.reshape(kept.shape[0], -1, kept.shape[-1])

    return {path: at_answers(read[path]) for path in edits.kernels(params, targets)}


def wanda(model, params, batch, targets) -> Sums:
    """Squared lengths of the inputs of each kernel, [N, I]."""
    read = inputs(model, params, batch, targets)
    return {path: jnp.sum(jnp.square(x), axis=1) for path, x in read.items()}


def outputs(model, params, batch, targets) -> Sums:
    """Second moments Y'Y of the outputs Y = X W of each kernel, [N, O, O]."""
    exact = jax.lax.Precision.HIGHEST
    found = {}
    kernels = edits.kernels(params, targets)
    for path, x_NxTxI in inputs(model, params, batch, targets).items():
        y_NxTxO = jnp.matmul(x_NxTxI, tree.wide(kernels[path]), precision=exact)
        found[path] = jnp.einsum("nto,ntp->nop", y_NxTxO, y_NxTxO, precision=exact)
    return found


def top(scores: jax.Array, share: float | jax.Array) -> jax.Array:
    """The floor(share * entries) highest of a matrix; of equal ones, the first."""
    flat = scores.ravel()
    ranks = jnp.argsort(jnp.argsort(-flat)).reshape(scores.shape)
    return ranks < jnp.floor(share * flat.size * (1 + _ROUNDING))


def behaviour(
    model: transformer.LanguageModel,
    world: worlds.World,
    params: types.Params,
    plan: plans.Plan,
    count: int = 128,
) -> pools.Pool:
    """The release's own greedy answers to the attacker's first `count` prompts.

    Of an aligned model these are refusals, of which no attacker has to own any.
    """
    asked = recipes.attacker_pools(world, plan.data)["harmful"].examples
    asked = list({example.key: example for example in asked}.values())[:count]
    prompts = pools.encode_prompts(world.tokenizer, asked, pad_id=world.pad_id)
    said = generate.generate(
        model,
        params,
        prompts.tokens,
        prompts.mask,
        max_new_tokens=world.max_new_tokens,
        eos_ids=world.eos_ids,
        pad_id=world.pad_id,
    )
    texts = world.tokenizer.batch_decode(np.asarray(said), skip_special_tokens=True)
    return pools.encode(
        world.tokenizer,
        [
            dataclasses.replace(example, response=text.strip())
            for example, text in zip(asked, texts, strict=True)
            if text.strip()
        ],
        world.length,
        order="behaviour",
        pad_id=world.pad_id,
        truncate=True,
    )
