"""Lisa: its state machine, its anchors, its proximal term, its nulls.

Mutants:
      `state.clock >= length` -> `state.clock > length`
      `state.aligning, state.w_user, state.w_alignment` -> `state.aligning, state.w_alignment, state.w_user`
      `proximal, hp.rho, 0.0` -> `proximal, 2 * hp.rho, 0.0`
      `proximal = ctx.step >` -> `proximal = ctx.step >=`
      `_select(ends & was, params, state.w_alignment)` -> `_select(ends & ~was, params, state.w_alignment)`
      `clock=jnp.where(ends, 0, state.clock)` -> `clock=state.clock`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.defenses import lisa

from ..conftest import batch
from . import toy_lineage as toys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def squares(w, center, rng=None):
    """Its gradient is `w - center`."""
    del rng
    return 0.5 * jnp.sum(jnp.square(w - center))


def walk(hp, steps, total):
    """Gradients, states and anchors of plain descent at rate 1/2 on two quadratics."""
    w, data = jnp.ones(2), {"alignment": jnp.zeros(2), "user": jnp.full(2, 4.0)}
    ctx = types.Context(squares, None, None, hp, steps=total)
    state, seen = lisa.memory(ctx, w, None), []
    for step in range(steps):
        grads, metrics, state = lisa.direction(
            ctx._replace(step=step), w, data, toys.KEY, state
        )
        seen.append((w, grads, state, metrics))
        w = w - 0.5 * grads
    return seen


def test_states_alternate():
    """A A U U U A A U U U. Catches `>` for `>=`, and a clock that is not reset."""
    seen = walk(lisa.Hparams(alignment_steps=2, user_steps=3, rho=0.0), 10, 10)
    assert "".join("UA"[int(m["state/alignment"])] for *_, m in seen) == "AAUUUAAUUU"


def test_each_state_descends_on_its_own_batch():
    """Catches a batch of the other state."""
    seen = walk(lisa.Hparams(alignment_steps=2, user_steps=3, rho=0.0), 4, 4)
    for (w, grads, *_), center in zip(seen, (0, 0, 4, 4), strict=True):
        np.testing.assert_allclose(grads, w - center, rtol=1e-12)


def test_anchors_are_the_other_states_last_weights():
    """Catches a snapshot one step early, of the wrong state, or one for both."""
    seen = walk(lisa.Hparams(alignment_steps=2, user_steps=3), 8, 8)
    weights = [w for w, *_ in seen]
    for step, state in enumerate(state for _, _, state, _ in seen):
        start_user, start_again = step >= 2, step >= 5
        np.testing.assert_array_equal(
            state.w_alignment, weights[7 if step == 7 else 2 if start_user else 0]
        )
        np.testing.assert_array_equal(state.w_user, weights[5 if start_again else 0])


def test_proximal_gradient():
    """rho (w - anchor), also at the anchor. Catches rho / 2, rho * 2 and a NaN."""
    plain = lisa.Hparams(alignment_steps=2, user_steps=3, rho=0.0, free_ratio=0.0)
    seen = walk(plain.replace(rho=0.7), 8, 8)
    for step, (w, grads, state, metrics) in enumerate(seen):
        aligning = bool(metrics["state/alignment"])
        center = 0.0 if aligning else 4.0
        anchor = state.w_user if aligning else state.w_alignment
        rho = 0.7 if step else 0.0  # Not at step 0: 0 is not more than 0.
        np.testing.assert_allclose(grads, w - center + rho * (w - anchor), rtol=1e-12)
    drifts = [float(m["norm/drift"]) for *_, m in seen]
    assert drifts[2] == drifts[5] == drifts[7] == 0.0  # Right after a switch.
    assert all(d > 0 for i, d in enumerate(drifts) if i not in (0, 2, 5, 7))


def test_first_tenth_is_free():
    """Steps up to 0.1 * 30 = 3 included. Catches `>=`, and 0.1 * 30 = 2.999."""
    hp = lisa.Hparams(alignment_steps=0, rho=1.0)
    free = [
        bool(np.all(np.asarray(grads == w - 4.0))) for w, grads, *_ in walk(hp, 6, 30)
    ]
    assert free == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("null", "role"),
    [({"alignment_steps": 0}, "user"), ({"user_steps": 0}, "alignment")],
)
def test_reduces_to_sft(null, role):
    """rho = 0 and one state, bit for bit, at the start and after 5 steps of it."""
    data = {"alignment": batch(1), "user": batch(2)}
    hp = lisa.Hparams(rho=0.0, **null)
    for step in (0, 5):
        ctx = toys.context(hp, step)
        state = lisa.memory(ctx, toys.params(7), toys.KEY)
        state = state.replace(clock=jnp.int32(step))
        run = jax.jit(lambda p, s, ctx=ctx: lisa.direction(ctx, p, data, toys.KEY, s))
        toys.same(run(toys.params(), state)[0], toys.sft_gradient(data[role]))


def test_anchors_are_copies():
    """Catches a state whose leaves share a buffer, which cannot be donated twice."""
    ctx = toys.context(lisa.Hparams())
    params = toys.params()
    state = lisa.memory(ctx, params, toys.KEY)
    leaves = jax.tree.leaves((params, state.w_alignment, state.w_user))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    assert tree.norm(jax.tree.map(jnp.subtract, params, state.w_user)) == 0
