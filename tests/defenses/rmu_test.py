"""RMU: the vector, what trains, and both distances, in float64.

Mutants:
  `far + hp.alpha * drift, (far` -> `far + drift, (far`
  `jnp.square(here_BxLxD - there)` -> `jnp.square(here_BxLxD + there)`
  `vector_1x1xD = hp.c * memory[None, None]` -> `vector_1x1xD = memory[None, None]`
  `states(ctx.reference(tokens, attended=seen), hp.layer)` -> `0 * states(ctx.reference(tokens, attended=seen), hp.layer)`
  `ctx.reference(tokens, attended=seen)` -> `ctx.reference(tokens)`
  `rng=rng, attended=seen` -> `rng=rng`
  `jax.random.uniform(rng, (width,), jnp.float32)` -> `jax.random.normal(rng, (width,), jnp.float32)`
  `u_D / jnp.linalg.norm(u_D)` -> `u_D`
  `(index > last - BLOCKS)` -> `(index >= last - BLOCKS)`
  `jnp.where(mask, leaf, frozen) if` -> `leaf if`
  `(module, kind) == ("down", "kernel")` -> `kind == "kernel"`
  `resid_NxBxLxD = outputs.hidden["resid"]` -> `resid_NxBxLxD = outputs.hidden["mlp"]`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import rmu
from ftdefense.methods import adapters
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import schedules
from ftdefense.objectives import distances

from ..conftest import batch
from . import common

DATA = {"harmful": batch(1), "benign": batch(2)}


def vector(seed: int = 0):
    return rmu.remember(
        common.context(rmu.Hparams()), common.params(), jax.random.key(seed)
    )


def started(hp, weights):
    """Directed at `weights`, in a stage that starts from `common.params()`."""
    return common.directed(rmu, hp, DATA, vector(), weights=weights)


def states(w, role, layer):
    rows = DATA[role]
    outputs = common.MODEL(w, rows.tokens, attended=distances.attended(rows))
    return outputs.hidden["resid"][layer]


def test_vector_has_length_c_and_positive_entries():
    """Catches a Gaussian vector, and one that is not normalised."""
    u_D = vector()
    np.testing.assert_allclose(jnp.linalg.norm(u_D), 1.0, rtol=1e-6)
    assert u_D.shape == (8,) and np.all(u_D >= 0)
    assert np.any(u_D != vector(1))


def test_at_the_start_only_the_steering_acts():
    """L_r = 0 with gradient 0, L_f = mean((h - v)^2). Catches another reference, or c;
    padding that reads padding.
    """
    hp = rmu.Hparams(c=3.0, alpha=1200.0, layer=1)
    grads, metrics, _ = started(hp, common.params())

    def far(w):
        return jnp.mean((states(w, "harmful", 1) - 3.0 * vector()[None, None]) ** 2)

    value, expected = jax.jit(jax.value_and_grad(far))(common.params())
    np.testing.assert_allclose(metrics["distance/harmful"], value, rtol=1e-12)
    assert metrics["drift/benign"] < 1e-20
    down = [g["layers"]["mix"].pop("down")["kernel"] for g in (grads, expected)]
    common.close(*down, rtol=1e-9, atol=1e-12)
    common.equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_away_from_the_start_benign_states_are_held():
    """alpha * mean((h - h_0)^2) is added. Catches alpha left out, or a sum for a mean;
    a reference whose padding reads padding.
    """
    hp = rmu.Hparams(c=3.0, alpha=7.0, layer=0)
    away = tree.add_scale(common.params(), 0.3, common.params(9))
    grads, metrics, _ = started(hp, away)

    def loss(w):
        first = states(common.params(), "benign", 0)
        drift = jnp.mean((states(w, "benign", 0) - first) ** 2)
        far = jnp.mean((states(w, "harmful", 0) - 3.0 * vector()[None, None]) ** 2)
        return far + 7.0 * drift, drift

    expected, drift = jax.jit(jax.grad(loss, has_aux=True))(away)
    down = [g["layers"]["mix"]["down"]["kernel"] for g in (grads, expected)]
    common.close(*down, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics["drift/benign"], drift, rtol=1e-12)
    np.testing.assert_array_equal(down[0][1], 0.0)


def free(hp, weights, first):
    """Direction of five blocks whose parameters [N, B, L, D] add up to the stream."""

    def model(params, tokens, rng=None, attended=None):
        del tokens, rng, attended
        resid = params["layers"]["mlp"]["down"]["kernel"]
        return types.Outputs(None, {"resid": jnp.cumsum(resid, 0)})

    def params(x):
        kernel = jnp.zeros((5, *x.shape)).at[0].set(x)
        return {"layers": {"mlp": {"down": {"kernel": kernel}}}}

    ctx = types.Context(
        loss=None,
        model=model,
        lineage=None,
        hp=hp,
        reference=lambda tokens, attended: model(params(first), tokens),
    )
    data = {role: batch(1, rows=2, length=3) for role in ("harmful", "benign")}
    unit = jnp.full((4,), 0.5)
    run = jax.jit(lambda w: rmu.direction(ctx, w, data, common.KEY, unit))
    grads, _, _ = run(params(weights))
    return grads["layers"]["mlp"]["down"]["kernel"]


@pytest.mark.parametrize("alpha", [0.5, 1e6])
def test_closed_form_of_the_minimum(alpha):
    """(v + alpha h_0) / (1 + alpha), which is h_0 at infinity. Catches a sign, a fourth block."""
    first = jax.random.normal(jax.random.key(0), (2, 3, 4))
    best = (6.0 * 0.5 + alpha * first) / (1 + alpha)
    hp = rmu.Hparams(c=6.0, alpha=alpha, layer=3)
    np.testing.assert_allclose(free(hp, best, first), 0.0, atol=1e-9)
    slope = (2 * (first - 3.0) / first.size)[None]
    found = free(hp, first, first)
    np.testing.assert_allclose(found[1:4], jnp.tile(slope, (3, 1, 1, 1)), rtol=1e-9)
    np.testing.assert_array_equal(found[np.array([0, 4])], 0.0)


def test_three_blocks_train():
    """Blocks l - 2, l - 1, l of the down projection, and nothing else."""
    leaf = jnp.zeros((9, 2, 3))
    params = {
        "embed": {"embedding": jnp.zeros((5, 3))},
        "layers": {
            "mlp": {"down": {"kernel": leaf}, "up": {"kernel": leaf}},
            "mlp_norm": {"scale": leaf[0]},
        },
    }
    masks = rmu.active(common.context(rmu.Hparams(layer=7)), params)
    mask = masks["layers"]["mlp"].pop("down")["kernel"]
    np.testing.assert_array_equal(np.flatnonzero(mask), [5, 6, 7])
    assert not any(m.any() for m in jax.tree.leaves(masks))
    masks = rmu.active(common.context(rmu.Hparams(layer=20)), params)
    np.testing.assert_array_equal(
        np.flatnonzero(masks["layers"]["mlp"]["down"]["kernel"]), [6, 7, 8]
    )


def test_weight_decay_spares_what_is_frozen():
    """Catches an optimizer that is not told what trains."""
    decaying = optimizers.Optimizer(
        0.1, schedules.Schedule(), weight_decay=0.5, kind="adamw_by_leaf"
    )
    hp = rmu.Hparams(decaying.tabulate(2), layer=0)
    origin = types.Lineage(common.params())
    method = rmu.method(common.MODEL)
    state = method.init(origin, hp, common.KEY)
    state, _ = jax.jit(method.step)(state, origin, DATA, common.KEY)
    before, after = (x["layers"]["mix"] for x in (origin.current, state.params))
    common.equal(before["up"], after["up"])
    np.testing.assert_array_equal(
        before["down"]["kernel"][1], after["down"]["kernel"][1]
    )
    assert np.all(before["down"]["kernel"][0] != after["down"]["kernel"][0])


def test_microbatches_make_no_difference():
    """Catches a mean of the parts' sums."""
    whole = started(rmu.Hparams(layer=0), common.params())
    halves = started(rmu.Hparams(layer=0, microbatches=2), common.params())
    common.close(whole, halves, rtol=1e-9, atol=1e-12)


def test_an_adapter_trains_in_these_blocks_alone():
    """Catches factors that are frozen for not being called down."""
    adapter = adapters.LoRA(rank=2, targets=("up", "lm_head"))
    factors = adapter.init(common.params(), common.KEY)
    ctx = lift.context(
        common.MODEL,
        types.Lineage(common.params()),
        rmu.Hparams(adapter=adapter, layer=0),
    )
    masks = rmu.active(ctx, factors)
    up = masks["layers"]["mix"]["up"]
    assert all(np.flatnonzero(up[name]).tolist() == [0] for name in "ab")
    assert not any(m.any() for m in jax.tree.leaves(masks["lm_head"]))


def test_wrong_settings_are_user_errors():
    """Catches an index that wraps around, and a run that trains nothing."""
    with pytest.raises(errors.UserError, match="layer"):
        rmu.streams(rmu.Hparams(layer=-1))
    with pytest.raises(errors.UserError, match="down"):
        rmu.active(common.context(rmu.Hparams()), {"lm_head": {"kernel": jnp.eye(2)}})
