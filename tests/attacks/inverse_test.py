"""Inverse objective: nulls of the defenses, closed form, identity with SideStepper.

Mutants:
  `grads, -length,` -> `grads, length,`
  `full, -1.0, null` -> `full, -0.9, null`
  `hp.mu * tree.norm(grad_harm)` -> `hp.mu`
  `along(own)` -> `along(own.replace(**module.NULL))`
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import inverse
from ftdefense.attacks import sidestepper
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.defenses import booster
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.models import toy
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
METHOD = inverse.method(MODEL)
KEY = jax.random.key(0)
NAMED = [
    name
    for name in registry.names("defenses")
    if hasattr(registry.load("defenses", name), "NULL")
]


def quadratic(w, center, rng=None):
    del rng
    return 0.5 * jnp.sum(jnp.square(w - center))


def batches(hp):
    found = {}
    for i, (role, shape) in enumerate(METHOD.streams(hp).items()):
        parts = [batch(50 * i + j) for j in range(math.prod(shape))]
        stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
        found[role] = jax.tree.map(
            lambda x, s=shape: x.reshape(*s, *x.shape[1:]), stacked
        )
    return found


def test_closed_form_against_booster():
    """R's gradient there is lam alpha (w - b) / |w - b|. Catches descent on R, and a mu
    that the defense's scale or the length of the harmful gradient does not cancel.
    """
    w, a, c, b = (jax.random.normal(jax.random.key(i), (5,)) for i in range(4))
    hp = inverse.Hparams(lam=0.5, mu=0.7)
    ctx = types.Context(quadratic, None, None, hp)
    data = {"harmful": a, "benign": c}
    data |= {"defense_alignment": c, "defense_harmful": b}
    grads, metrics, _ = inverse.direction(ctx, w, data, KEY, None)
    unit = (w - b) / jnp.linalg.norm(w - b)
    expected = (w - a) + 0.5 * (w - c) - 0.7 * jnp.linalg.norm(w - a) * unit
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-5)
    preset = booster.PRESETS["sandbox"].hp
    length = preset.lam * preset.alpha
    np.testing.assert_allclose(metrics["norm/regulariser"], length, rtol=1e-3)


def test_without_ascent_it_is_sidestepper():
    """But for rounding. Catches a lam left out, and an R that mu does not scale."""
    hp = inverse.Hparams(lam=0.5, mu=0.0)
    data, params = batches(hp), MODEL.init(KEY)
    ctx = lift.context(MODEL, types.Lineage(params), hp)
    other = ctx._replace(hp=sidestepper.Hparams(lam=0.5))
    grads = jax.jit(lambda p: inverse.direction(ctx, p, data, KEY, None)[0])(params)
    expected = jax.jit(lambda p: sidestepper.direction(other, p, data, KEY)[0])(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads,
        expected,
    )


def small(hp):
    """Fewer simulated steps: the programs are compiled here."""
    for field in ("inner_steps", "tasks"):
        if hasattr(hp, field):
            hp = hp.replace(**{field: min(getattr(hp, field), 2)})
    return hp.replace(every=1) if hasattr(hp, "every") else hp


@pytest.mark.parametrize("name", NAMED)
def test_nulls_of_the_defenses(name, monkeypatch):
    """Catches a null that names no number, one that switches nothing off (R = 0 at the
    preset), and a term that survives it (R != 0 at the null itself).
    """
    module = registry.load("defenses", name)
    own = small(module.PRESETS["sandbox"].hp)
    # What the first step would leave out, or might.
    on = {"lam": 1.0, "jitter": 1e-2, "augment": 1.0}
    on |= {"growth": "constant"} if name == "vaa" else {}
    own = own.replace(**{k: v for k, v in on.items() if hasattr(own, k)})
    assert all(isinstance(getattr(own, field), float) for field in module.NULL)
    hp = inverse.Hparams(optimizers.Optimizer().tabulate(4), defense=name)
    pretrained, moved = (MODEL.init(jax.random.key(i)) for i in range(2))
    params = tree.add_scale(pretrained, 0.1, moved)
    lineage = types.Lineage(params, pretrained)

    monkeypatch.setattr(inverse, "target", lambda hp: (module, own))
    data = batches(hp)

    def norm(own, params, data):
        ctx = lift.context(MODEL, lineage, hp, jnp.int32(0))
        monkeypatch.setattr(inverse, "target", lambda hp: (module, own))
        init = inverse.defended(MODEL, hp).init
        memory = init(lineage, own, KEY).memory
        found, _ = inverse.regulariser(ctx, params, data, KEY, memory)
        return tree.norm(found)

    find = jax.jit(norm)
    if module.NULL:
        assert find(own.replace(**module.NULL), params, data) == 0
    assert find(own, params, data) > 1e-6


def test_a_defense_without_a_null_is_refused():
    """Catches an AttributeError where a user mistakes the target."""
    with pytest.raises(errors.UserError, match="rmu"):
        METHOD.streams(inverse.Hparams(defense="rmu"))


def test_roles_are_the_defenders_but_for_what_is_harmful():
    """Catches the defender's harmful rows leaking to the attacker, and lost pairing."""
    world = sandbox.build("tiny", 0)
    plan = inverse.PRESETS["sandbox"]
    for name in ("sdd", "booster", "ktipa_noh", "seam"):
        hp = plan.hp.replace(defense=name)
        given = plan.__class__(hp)
        roles = inverse.derive(MODEL, world, None, given, 0)
        assert {*METHOD.streams(hp)} - {"harmful", "benign"} == {*roles}
        theirs = {(e.key, e.response) for e in world.defender["harmful"].examples}
        for role, rows in roles.items():
            assert not {(e.key, e.response) for e in rows.examples} & theirs, role
    pair = roles["defense_harmful"], roles["defense_refusal"]
    assert pair[0].order == pair[1].order
    assert [e.key for e in pair[0].examples] == [e.key for e in pair[1].examples]


def test_sdd_is_ascended_where_it_mispairs():
    """Catches its benign rows among them: what they teach is to be kept."""
    world = sandbox.build("tiny", 0)
    plan = inverse.PRESETS["sandbox"]
    given = plan.__class__(plan.hp.replace(defense="sdd"))
    (rows,) = inverse.derive(MODEL, world, None, given, 0).values()
    assert {e.label for e in rows.examples} == {"harmful"}
    assert len(rows) == len(world.defender["unrelated"]) / 2


def test_it_learns_what_is_harmful():
    """Catches an ascent that outweighs the descent, and one on the harmful loss."""
    hp = inverse.Hparams(optimizers.Optimizer(3e-2), mu=0.3)
    method = registry.method("attacks", "inverse", MODEL)
    lineage = types.Lineage(MODEL.init(KEY))
    same = jax.tree.map(lambda x: np.stack([x] * 12), batches(hp))
    state = loop.init(method, lineage, hp, KEY, 12)
    _, metrics = loop.run_chunk(
        method.step, False, state, lineage, same, KEY, jnp.int32(0)
    )
    assert metrics["loss/harmful"][-1] < 0.8 * metrics["loss/harmful"][0]
