"""VAA: A1, A2, and which group is drawn.

Mutants:
  `hp.rho, tree.normalize(grad)` -> `-hp.rho, tree.normalize(grad)`
  `hp.rho, tree.normalize(grad)` -> `hp.rho, grad`
  `> 1 - hp.lam * progress` -> `> hp.lam * progress`
  `jnp.where(vulnerable, share, 1 - share)` -> `jnp.where(vulnerable, 1 - share, share)`
  `eta * loss / own` -> `eta * loss`
  `jax.random.uniform(rng_group) <= p` -> `jax.random.uniform(rng_group) > p`
  `ctx.step / max(ctx.steps, 1)` -> `1.0`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import tree
from ftdefense.defenses import vaa

from ..conftest import batch
from . import common

DATA = {"vulnerable": batch(1), "steady": batch(2)}


def directed(p, step=0, **fields):
    memory = {"p": jnp.float32(p)}
    return common.directed(
        vaa, vaa.Hparams(**fields), DATA, memory, step=step, steps=100
    )


@pytest.mark.parametrize(("p", "group"), [(1.0, "vulnerable"), (0.0, "steady")])
def test_without_ascent_it_is_sft_on_the_drawn_group(p, group):
    """lam = 0, exactly; also at step 0, where lam * t / T is 0. Catches a mixed batch."""
    expected = common.sft_gradient(DATA[group])
    grads, _, _ = directed(p, step=99, lam=0.0)
    common.equal(grads, expected)
    grads, metrics, _ = directed(p, step=0, lam=1.0)
    common.equal(grads, expected)
    assert metrics["share/ascent"] == 0


def test_ascent_step():
    """A2: the gradient at w + rho ghat, where the group's own loss is larger."""
    grads, metrics, _ = directed(1.0, step=100, lam=1.0, rho=0.3)
    w, g = common.params(), common.sft_gradient(DATA["vulnerable"])
    uphill = tree.add_scale(w, 0.3 / (tree.norm(g) + 1e-7), g)
    common.close(grads, common.sft_gradient(DATA["vulnerable"], uphill), rtol=1e-9)
    assert metrics["loss/applied"] > metrics["loss/alignment"]


def test_p_follows_the_loss():
    """A1: no loss, no change; more loss, more of that group; within [0.1, 0.9]."""
    for vulnerable in (True, False):
        still = vaa.adjust(0.4, 0.0, vulnerable, 0.1)
        np.testing.assert_allclose(still, 0.4, rtol=1e-6)
    up = [vaa.adjust(0.4, loss, True, 0.1) for loss in (1.0, 2.0)]
    down = [vaa.adjust(0.4, loss, False, 0.1) for loss in (1.0, 2.0)]
    assert 0.4 < up[0] < up[1]
    assert 0.4 > down[0] > down[1]
    assert vaa.adjust(0.4, 1e6, True, 1.0) == pytest.approx(0.9)
    assert vaa.adjust(0.4, 1e6, False, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("vulnerable", [True, False])
def test_p_by_the_formula(vulnerable):
    """a / (a + c) with a or c grown by exp(eta l / its probability)."""
    p, loss, eta = 0.3, 1.7, 0.05
    a = p * np.exp(eta * loss / p) if vulnerable else p
    c = 1 - p if vulnerable else (1 - p) * np.exp(eta * loss / (1 - p))
    found = vaa.adjust(p, loss, vulnerable, eta)
    np.testing.assert_allclose(found, a / (a + c), rtol=1e-6)


def test_p_reads_the_applied_loss():
    """Catches the clean loss after an ascent step."""
    hp = {"lam": 1.0, "rho": 2.0, "eta": 0.1}
    _, metrics, memory = directed(0.999, step=100, **hp)
    expected = vaa.adjust(0.999, metrics["loss/applied"], True, 0.1)
    np.testing.assert_allclose(memory["p"], expected, rtol=1e-6)


def test_groups_are_drawn_with_probability_p():
    """Catches a fair coin."""
    keys = jax.random.split(common.KEY, 400)

    def group(key):
        ctx = common.context(vaa.Hparams(lam=0.0), 0, 100)
        data = {"vulnerable": jnp.ones(3), "steady": jnp.zeros(3)}
        ctx = ctx._replace(loss=lambda w, b, rng: jnp.sum(w * b))
        grads, _, _ = vaa.direction(ctx, jnp.ones(3), data, key, {"p": 0.8 + 0 * key_f})
        return grads[0]

    key_f = jnp.float32(0)
    assert 0.7 < jax.jit(jax.vmap(group))(keys).mean() < 0.9
