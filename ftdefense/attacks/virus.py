"""Virus: harmful rows whose words are exchanged until a provider's guard lets them pass.

Threat       service (its data alone) and open_weight; knowledge: the release's gradients
             and the guard, which the provider makes from rows of its own.
Minimises    over the tokens x of a segment inside a benign row, one exchange at a time,
             -(1 - lam) * <g(x), g(x0)> / ||g(x)|| + lam * (-log P(safe | x)), g the
             gradient of the row's loss over LoRA factors, x0 the harmful question and
             answer; ||g(x)|| is constant where the slope is taken. Then L(user): rows
             that pass, among benign ones. A row: benign question, segment, benign answer;
             the loss asks for all but the question.
Source       Huang et al. 2025, arXiv:2501.17433 (specs/attacks.md B.19).
Evidence     CODE for the search and the recipe of `paper`; UNVERIFIED that all of the
             segment is asked for, and the adapter of the search (the line's is taken).
Differs      the guard counts tokens (data/moderation.py), for LlamaGuard-2. A row that
             passes stays one that does. What is submitted are ids: a tokenizer of bytes
             may split their text otherwise.
Reduces to   the harmful rows that pass as they are, at epochs = 0; evading the guard,
             whatever the row teaches, at lam = 1.
Cost         1 forward, 1 backward; before training, for each harmful row and epoch, as
             much for each candidate, and 1 backward through 1 of both.
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import chat
from ftdefense.data import moderation
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import world as worlds
from ftdefense.methods import adapters
from ftdefense.methods import exchanges
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.objectives import losses

SUBMITS = ("user",)  # To a service; see serving.submitted.


@struct.dataclass
class Hparams(lift.Hparams):
    """Of the search; its shapes are static."""

    lam: float = 0.1  # Weight of the guard.
    epochs: int = struct.field(pytree_node=False, default=50)
    top: int = struct.field(pytree_node=False, default=64)  # Tokens for a place.
    candidates: int = struct.field(pytree_node=False, default=128)  # In an epoch.
    rank: int = struct.field(pytree_node=False, default=32)  # Of the factors.
    targets: tuple[str, ...] = struct.field(
        pytree_node=False, default=adapters.ATTENTION
    )


@struct.dataclass
class Row:
    """Tokens and weights [L], and 1 where the segment is."""

    tokens: jax.Array
    weights: jax.Array
    free: jax.Array


def shares_loss(model, params, factors, weights_L, shares_LxV):
    """A row's loss, its tokens read and asked for by their shares of each position."""
    table_VxD = params["embed"]["embedding"]

    def enter(hidden, site, layer, tap):
        del layer, tap
        mixed_LxD = shares_LxV.astype(table_VxD.dtype) @ table_VxD
        return mixed_LxD[None] if site == "embed" else hidden

    tokens_L = jnp.argmax(shares_LxV, -1)
    logits_LxV = model(factors, tokens_L[None], intervene=enter).logits[0]
    nats_L = -jnp.sum(shares_LxV[1:] * jax.nn.log_softmax(logits_LxV[:-1]), -1)
    total = jnp.sum(nats_L * weights_L[1:])
    return losses.average(total, jnp.sum(weights_L[1:]))


def search(model, params, guard, allowed_V, hp: Hparams, row: Row, rng):
    """Of one row: tokens [L]; the objective, and whether it passes, after each epoch."""
    adapter = adapters.LoRA(alpha=4.0, rank=hp.rank, targets=hp.targets)
    rng_factors, rng_exchange = jax.random.split(rng)
    factors, bound = adapter.init(params, rng_factors), adapter.bind(model, params)
    real_L = (jnp.cumsum(row.weights[::-1])[::-1] > 0).astype(jnp.float32)

    def gradient(tokens_L):
        batch = types.Batch(tokens_L[None], row.weights[None])
        return jax.grad(losses.next_token(bound))(factors, batch)

    def count(shares_LxV):
        return real_L @ shares_LxV

    def shares(tokens_L):
        return jax.nn.one_hot(tokens_L, len(allowed_V))

    def both(along, counts_V):
        return hp.lam * guard.loss(counts_V) - (1 - hp.lam) * along

    wanted = gradient(row.tokens)

    def value(tokens_L):
        counts_V = count(shares(tokens_L))
        along = tree.dot(tree.normalize(gradient(tokens_L)), wanted)
        return both(along, counts_V), guard.log_odds(counts_V) < 0

    def slope(tokens_L):
        length = tree.norm(gradient(tokens_L))

        def relaxed(shares_LxV):
            def loss(factors):
                return shares_loss(bound, params, factors, row.weights, shares_LxV)

            along = jax.jvp(loss, (factors,), (wanted,))[1]
            along /= jnp.maximum(length, jnp.finfo(length.dtype).tiny)
            return both(along, count(shares_LxV))

        return jnp.where(allowed_V, jax.grad(relaxed)(shares(tokens_L)), jnp.inf)

    return exchanges.descend(
        row.tokens,
        row.free,
        rng_exchange,
        value,
        slope,
        epochs=hp.epochs,
        top=hp.top,
        count=hp.candidates,
    )


def carried(world: worlds.World, harmful, carriers) -> tuple[pools.Pool, np.ndarray]:
    """Benign rows with a harmful question and answer before theirs; 1 where that is."""
    texts = [f"{e.prompt[-1]['content']} {e.response}" for e in harmful]
    inner = world.tokenizer(texts, add_special_tokens=False)["input_ids"]
    outer = chat.render_rows(world.tokenizer, tuple(carriers))
    width = max(len(a) + len(b) for a, (b, _) in zip(inner, outer, strict=True))
    tokens = np.full((len(inner), width), world.pad_id, np.int32)
    weights, free = np.zeros((2, *tokens.shape), np.float32)
    for i, (segment, (ids, start)) in enumerate(zip(inner, outer, strict=True)):
        row = [*ids[:start], *segment, *ids[start:]]
        tokens[i, : len(row)] = row
        weights[i, start : len(row)] = 1
        free[i, start : start + len(segment)] = 1
    # To the service they are answers to the benign questions.
    asked = [
        dataclasses.replace(e, prompt=c.prompt, response=f"{text} {c.response}")
        for e, c, text in zip(harmful, carriers, texts, strict=True)
    ]
    return pools.Pool(tokens, weights, "user", tuple(asked)), free


def reworded(world: worlds.World, pool: pools.Pool, tokens: np.ndarray) -> pools.Pool:
    """The same rows of other tokens, whose examples say what they now answer."""
    said = [ids[weights > 0] for ids, weights in zip(tokens, pool.weights, strict=True)]
    texts = world.tokenizer.batch_decode(said, skip_special_tokens=True)
    examples = (
        dataclasses.replace(example, response=text)
        for example, text in zip(pool.examples, texts, strict=True)
    )
    return dataclasses.replace(pool, tokens=tokens, examples=tuple(examples))


def words(world: worlds.World, size: int) -> np.ndarray:
    """Which ids may be written: printable ASCII, and nothing special; bool [size]."""
    ids = range(min(size, len(world.tokenizer)))
    special = {*world.tokenizer.all_special_ids, world.pad_id}
    texts = world.tokenizer.batch_decode([[i] for i in ids])
    fine = [
        i not in special
        and text.isascii()
        and text.isprintable()
        and bool(text.strip())
        for i, text in zip(ids, texts, strict=True)
    ]
    return np.pad(np.array(fine), (0, size - len(fine)))


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """Role `user`: the searched rows that pass, and the recipe's benign ones."""
    hp, found = plan.hp, recipes.attacker_pools(world, plan.data)
    is_harmful = np.array([e.label == "harmful" for e in found["user"].examples])
    harmful = [e for e in found["user"].examples if e.label == "harmful"]
    carriers = found["benign"].examples[-len(harmful) :]  # The filler is in front.
    if not harmful or len(carriers) < len(harmful):
        raise errors.UserError(
            f"virus: {len(harmful)} harmful rows, to be hidden in as many of "
            f"{len(found['benign'])} benign ones; change data.poison_ratio or "
            "data.sample_count."
        )
    pool, free = carried(world, harmful, carriers)
    size = len(params["embed"]["embedding"])
    guard = moderation.fit(world, size)
    if hp.epochs:
        rows = Row(*map(jnp.asarray, (pool.tokens, pool.weights, free)))
        allowed = jnp.asarray(words(world, size))
        tokens, _, _ = searched(
            model, params, guard, allowed, hp, rows, jax.random.key(seed)
        )
        pool = reworded(world, pool, np.asarray(tokens))
    passed = np.flatnonzero(moderation.passes(guard, pool))
    rest = pools.take(found["user"], np.flatnonzero(~is_harmful))
    parts = [part for part in (pools.take(pool, passed), rest) if len(part)]
    if not parts:
        raise errors.UserError(
            f"virus: the guard stops all {len(pool)} rows, and there are no others; "
            "raise attack.epochs or attack.lam, or set data.poison_ratio below 1."
        )
    width = max(part.tokens.shape[1] for part in parts)
    parts = [pools.widen(part, width, world.pad_id) for part in parts]
    return {"user": pools.concatenate(parts, "user")}


@functools.partial(jax.jit, static_argnames="model")
def searched(model, params, guard, allowed_V, hp: Hparams, rows: Row, rng):
    """`search` of rows whose leaves are [rows, L]."""
    rngs = jax.random.split(rng, len(rows.tokens))
    one = functools.partial(search, model, params, guard, allowed_V, hp)
    return jax.lax.map(lambda xs: one(*xs), (rows, rngs))


def method(model: types.Model) -> types.Method:
    return lift.supervised(model, "user")


def _sandbox(epochs: int, note: str) -> plans.Plan:
    search = {"epochs": epochs, "top": 16, "candidates": 16, "rank": 4}
    return plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING, **search),
        data=recipes.Recipe(sample_count=300, poison_ratio=0.1, filler="benign"),
        source=f"DESIGN: the paper's share of harmful rows, rate and steps as sft; {note}",
    )


PRESETS = {
    "sandbox": _sandbox(20, "as many exchanges as a segment has tokens, twice"),
    "sandbox_unsearched": _sandbox(0, "as they are, as a control"),
    "paper": plans.Plan(
        Hparams(
            optimizers.Optimizer(1e-4, weight_decay=0.1),
            adapters.LoRA(4.0, None, 32, adapters.ATTENTION),
        ),
        batch_size=5,
        epochs=20,
        data=recipes.Recipe(sample_count=500, poison_ratio=0.1, filler="benign"),
        source="git-disl/Virus: specs/attacks.md B.19; the adapter is the line's",
    ),
}
