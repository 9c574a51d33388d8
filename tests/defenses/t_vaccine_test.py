"""T-Vaccine: T1 to T3, and what freezing means.

Mutants:
  `g_NxBxLxD, 0)` -> `g_NxBxLxD, g_NxBxLxD)`
  `ctx.step % hp.draw_every == 0` -> `ctx.step % hp.draw_every != 0`
  `ctx.step % hp.score_every == 0` -> `ctx.step % hp.score_every != 0`
  `jnp.square(g_NxBxLxD), (1, 2, 3)` -> `jnp.square(g_NxBxLxD), (0, 2, 3)`
  `hp.rho * tree.normalize` -> `-hp.rho * tree.normalize`
  `replace=False` -> `replace=True`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import t_vaccine
from ftdefense.defenses import vaccine
from ftdefense.methods import freezing
from ftdefense.methods import optimizers
from ftdefense.methods import shifts

from ..conftest import batch
from . import common

DATA = {"alignment": batch(1), "harmful": batch(2)}
FIRST = {
    "probability": jnp.array([0.9, 0.1], jnp.float32),
    "drawn": jnp.array([True, False]),
}


def directed(step, **fields):
    hp = t_vaccine.Hparams(scored_rows=4, **fields)
    return common.directed(t_vaccine, hp, DATA, FIRST, step=step)


def harmful_norms():
    ctx = common.context(t_vaccine.Hparams())
    _, g = shifts.gradient(ctx, common.params(), DATA["harmful"], None, "attn")
    return np.array([np.linalg.norm(layer) for layer in np.asarray(g)])


def test_all_layers_drawn_is_vaccine():
    """T2. Catches another site, another batch, a norm over all."""
    grads, _, _ = directed(0, rho=2.0, layers=2)
    expected, _ = common.directed(
        vaccine, vaccine.Hparams(rho=2.0), {"alignment": DATA["alignment"]}
    )
    common.equal(grads, expected)


def test_parts_of_a_batch_are_the_batch():
    """Catches a score of one row that is split in two, too."""
    hp = t_vaccine.Hparams(layers=1)
    whole, _, _ = common.directed(t_vaccine, hp, DATA, FIRST)
    parts, _, _ = common.directed(t_vaccine, hp.replace(microbatches=2), DATA, FIRST)
    common.close(parts, whole)


def test_unknown_scopes_are_refused():
    """Catches a name under which nothing is frozen."""
    with pytest.raises(errors.UserError, match="attention"):
        t_vaccine.streams(t_vaccine.Hparams(scope="attn_only"))


def test_the_norm_is_over_the_drawn_layers():
    """T1: length rho whatever is drawn, and no shift elsewhere."""
    grads, metrics, _ = directed(1, rho=2.0, layers=1)
    np.testing.assert_allclose(metrics["norm/shift"], 2.0, rtol=1e-5)
    ctx, w, data = common.context(t_vaccine.Hparams()), common.params(), batch(1)
    g = jax.jit(lambda w: shifts.gradient(ctx, w, data, None, "attn")[1])(w)
    shift = jnp.stack([2.0 * g[0] / (jnp.linalg.norm(g[0].ravel()) + 1e-7), 0 * g[1]])
    shifted = jax.jit(lambda *x: shifts.value_and_grad(ctx, *x, None, "attn", shift)[1])
    common.close(grads, shifted(w, data))


def test_probabilities_are_shares_of_harmful_norms():
    """Catches squared norms, alignment data, a sum over layers."""
    norms = harmful_norms()
    _, _, memory = directed(0, layers=1)
    np.testing.assert_allclose(memory["probability"], norms / norms.sum(), rtol=1e-6)


def test_scores_and_draws_are_kept_between_their_turns():
    """Catches a draw or a score in every step."""
    _, _, memory = directed(7, layers=1, draw_every=20, score_every=200)
    common.equal(memory, FIRST)
    _, _, memory = directed(20, layers=2, draw_every=20, score_every=200)
    np.testing.assert_array_equal(memory["drawn"], [True, True])
    np.testing.assert_array_equal(memory["probability"], FIRST["probability"])


def test_draws_distinct_layers_by_probability():
    """Catches replacement, and a uniform draw."""
    probability = jnp.array([0.85, 0.05, 0.05, 0.05])
    keys = jax.random.split(common.KEY, 200)
    masks = jax.vmap(lambda key: t_vaccine.draw(key, probability, 2))(keys)
    np.testing.assert_array_equal(masks.sum(-1), 2)
    assert masks[:, 0].mean() > 0.9


def test_frozen_layers_do_not_move():
    """T3. Catches zero gradients, which AdamW's moments and decay would still move."""
    optimizer = optimizers.Optimizer(1e-2, weight_decay=0.1, kind="adamw_by_leaf")
    hp = t_vaccine.Hparams(
        optimizer.tabulate(4), layers=1, draw_every=1, scope="layers"
    )
    method = t_vaccine.method(common.MODEL)
    origin = common.lineage()
    state = method.init(origin, hp, common.KEY)
    step = jax.jit(method.step)
    moved = []
    for i in range(4):
        before = state.params
        state, _ = step(state, origin, DATA, jax.random.key(i))
        changed = jax.tree.map(lambda a, b: a != b, before, state.params)
        layers = changed["layers"]["mix"]["up"]["kernel"].any((1, 2))
        np.testing.assert_array_equal(layers, state.memory["drawn"])
        assert changed["lm_head"]["kernel"].any()
        moved.append(np.asarray(layers))
    # A layer counts the steps in which it moved, and no others.
    count = state.opt_state[2].count["layers"]["mix"]["up"]["kernel"][:, 0, 0]
    np.testing.assert_array_equal(count, np.sum(moved, 0))


def test_the_scope_of_freezing():
    """The code freezes attention alone. Catches whole layers there."""
    params = {
        "layers": {
            "attention": {"q": {"kernel": jnp.zeros((2, 3, 3))}},
            "mlp": {"up": {"kernel": jnp.zeros((2, 3, 3))}},
        },
        "lm_head": {"kernel": jnp.zeros((3, 3))},
    }
    drawn = jnp.array([True, False])
    narrow = freezing.by_layer(params, drawn, "attention")
    wide = freezing.by_layer(params, drawn, "layers")
    q, up = (["attention", "q"], ["mlp", "up"])
    for masks, path, expected in (
        (narrow, q, [True, False]),
        (narrow, up, [True]),
        (wide, up, [True, False]),
    ):
        mask = masks["layers"][path[0]][path[1]]["kernel"]
        np.testing.assert_array_equal(mask.ravel(), expected)


def test_the_shift_ascends():
    """Catches a descent."""
    _, metrics, _ = directed(0, rho=1e-3, layers=2)
    assert metrics["loss/shifted"] > metrics["loss/alignment"]
    assert tree.norm(metrics["norm/shift"]) > 0
