"""Safety Anchor: where the states are read, how far they moved, the nulls.

Mutants:
      `weights_BxL > 0, axis=-1) - 1` -> `weights_BxL > 0, axis=-1)`
      `jnp.mean(jnp.square` -> `jnp.sum(jnp.square`
      `grads, ctx.hp.lam, grad_drift` -> `grads, -ctx.hp.lam, grad_drift`
      `outputs.hidden["final"]` -> `outputs.hidden["embed"]`
      `ctx.reference(anchors.tokens)` -> `ctx.model(params, anchors.tokens)`
      `x[: ctx.hp.anchors]` -> `x[-ctx.hp.anchors :]`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.defenses import sbr

from ..conftest import batch
from . import toy_lineage as toys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


DATA = {"user": batch(1), "harmful": batch(2)}


def run(hp, at=None, data=None):
    fn = jax.jit(lambda p, d: sbr.direction(toys.context(hp), p, d, toys.KEY))
    return fn(at or toys.params(), data or DATA)


def test_prompt_ends():
    """Prompts of 2, 1, 3 tokens and none. Catches the first answer token, the last."""
    weights = jnp.array([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(sbr.prompt_ends(weights), [1, 0, 2, 0])


def test_states_come_from_the_end_of_the_prompt():
    """Catches another site or an index along the batch."""
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    outputs = types.Outputs(None, {"final": hidden, "embed": -hidden})
    data = types.Batch(None, jnp.array([[0, 0, 1, 1], [0, 0, 0, 1]]))
    states = sbr.last_states(outputs, data)
    np.testing.assert_array_equal(states, [hidden[0, 1], hidden[1, 2]])


def test_lam_zero_is_sft():
    """Bit for bit, away from the start. Catches a term that lam does not scale."""
    at = tree.add_scale(toys.params(), 0.5, toys.params(9))
    grads, metrics = run(sbr.Hparams(lam=0.0), at)
    toys.same(grads, toys.sft_gradient(DATA["user"], at))
    assert metrics["drift/anchors"] > 0


def test_no_force_at_the_start():
    """Catches a distance whose gradient at zero is NaN, or a reference elsewhere."""
    grads, metrics = run(sbr.Hparams(lam=50.0))
    toys.close(grads, toys.sft_gradient(DATA["user"]))
    np.testing.assert_allclose(metrics["drift/anchors"], 0.0, atol=1e-24)


def test_closed_form():
    """h = w x: lam * 2 / (k d) * sum (h - h_0) x. Catches a sum, half, or a sign."""
    x_BxLxD = jax.random.normal(jax.random.key(1), (3, 4, 2))
    w, w_0 = jnp.array([0.7, -0.2]), jnp.array([0.1, 0.4])

    def model(w, tokens, rng=None):
        hidden = {"final": w[None, None] * x_BxLxD, "embed": x_BxLxD}
        return types.Outputs(None, hidden)

    ctx = types.Context(
        lambda w, data, rng: 0.0 * jnp.sum(w),
        model,
        None,
        sbr.Hparams(lam=5.0),
        reference=lambda tokens: model(w_0, tokens),
    )
    data = types.Batch(jnp.zeros((3, 4)), jnp.tile(jnp.array([0, 0, 1, 1]), (3, 1)))
    grads, _ = sbr.direction(ctx, w, {"user": data, "harmful": data}, toys.KEY)
    x_BxD = x_BxLxD[:, 1]
    expected = 5.0 * 2 / 6 * jnp.sum((w - w_0)[None] * x_BxD**2, axis=0)
    np.testing.assert_allclose(grads, expected, rtol=1e-6)


def test_the_anchors_are_a_few_fixed_prompts():
    """Spread over the prompts, each once. Catches a prompt in two wordings of its answer,
    the first of the list alone, and a shortage that passes.
    """
    world = sandbox.build("tiny", 0)
    chosen = sbr.select(sbr.Hparams(anchors=4), world.defender)["harmful"]
    assert len({e.key for e in chosen.examples}) == len(chosen) == 4
    assert len({e.topic for e in chosen.examples}) == 4
    for wrong in (0, 10**4):
        with pytest.raises(errors.UserError, match=r"set defense\.anchors"):
            sbr.select(sbr.Hparams(anchors=wrong), world.defender)


def test_only_the_anchors_prompts_count():
    """Other answers, and rows beyond the anchors, change nothing."""
    at = tree.add_scale(toys.params(), 0.5, toys.params(9))
    other = batch(3)
    tokens = DATA["harmful"].tokens.copy()
    tokens[:, 2:] = other.tokens[:, 2:]
    tokens[2:] = other.tokens[2:]
    changed = {**DATA, "harmful": types.Batch(tokens, DATA["harmful"].weights)}
    hp = sbr.Hparams(anchors=2)
    toys.close(run(hp, at)[0], run(hp, at, changed)[0])
