"""What is promised of every method, found by its file name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import cards
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import adapters
from ftdefense.models import toy
from ftdefense.training import checkpoint
from ftdefense.training import loop

from .conftest import batch

MODEL = toy.Toy()
STEPS = 3
METHODS = [
    (package, name)
    for package in ("attacks", "defenses")
    for name in registry.names(package)
]
# By method: what one test has compiled, the next finds.
everyone = pytest.mark.parametrize(("package", "name"), METHODS, scope="module")


def lineage() -> types.Lineage:
    pretrained, moved = (MODEL.init(jax.random.key(i)) for i in range(2))
    aligned = tree.add_scale(pretrained, 0.1, moved)
    twin = tree.add_scale(aligned, 0.1, pretrained)
    return types.Lineage(aligned, aligned, pretrained, twin)


def hparams(package, name, **changes):
    hp = registry.load(package, name).PRESETS["sandbox"].hp
    return dataclasses.replace(hp, **changes) if changes else hp


def batches(method, hp, steps=STEPS, rows=4):
    found = {}
    for i, (role, leading) in enumerate(method.streams(hp).items()):
        count = steps * math.prod(leading)
        parts = [batch(100 * i + j, rows) for j in range(count)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
        found[role] = jax.tree.map(
            lambda x, s=(steps, *leading): x.reshape(*s, *x.shape[1:]), stacked
        )
    return found


def start(method, hp, rng, mapped=False):
    return loop.init(method, lineage(), hp, rng, STEPS, mapped=mapped)


def alone(method, hp, rng, given):
    """The steps one by one, in one compiled program of one step."""
    state, origin = start(method, hp, rng), lineage()
    for i in range(STEPS if given else 0):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], given)
        state, _ = loop.run_chunk(
            method.step, False, state, origin, one, rng, jnp.int32(i)
        )
    return state


@everyone
def test_a_vmapped_scan_equals_single_steps(package, name):
    """Catches a step that reads anything but its arguments (a counter, a global key),
    and a `float(hp.x)` or an `if hp.x` that a traced number cannot pass.
    """
    method, hp = registry.method(package, name, MODEL), hparams(package, name)
    settings = [hp, jax.tree.map(lambda x: x * 0.5 if x > 1 else x, hp)]
    rngs = jax.random.split(jax.random.key(3), 2)
    given = batches(method, hp)
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *settings)
    together = start(method, stacked, rngs, mapped=True)
    if given:
        twice = jax.tree.map(lambda x: np.stack([x, x]), given)
        together, _ = loop.run_chunk(
            method.step, True, together, lineage(), twice, rngs, jnp.int32(0)
        )
    for i, setting in enumerate(settings):
        single = alone(method, setting, rngs[i], given)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            together.params,
            single.params,
        )


@everyone
def test_numbers_change_without_compiling(package, name):
    """Catches a numeric field marked static, or a schedule baked into the program."""
    method, hp = registry.method(package, name, MODEL), hparams(package, name)
    given = batches(method, hp)
    alone(method, hp, jax.random.key(0), given)
    before = loop.run_chunk._cache_size()
    other = jax.tree.map(lambda x: x * 0.7 if isinstance(x, float) else x, hp)
    alone(method, other, jax.random.key(1), given)
    assert loop.run_chunk._cache_size() == before


@everyone
def test_keeps_structure_and_dtypes_in_bfloat16(package, name):
    """Catches `params + hp.alpha * grads` without a cast: float32 in a bf16 carry."""
    method, hp = registry.method(package, name, MODEL), hparams(package, name)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lineage())
    given = jax.tree.map(lambda x: x[0], batches(method, hp))
    hp = jax.tree.map(jnp.asarray, loop.tabulate(hp, STEPS))
    state = jax.eval_shape(method.init, low, hp, jax.random.key(0))
    after, metrics = jax.eval_shape(method.step, state, low, given, jax.random.key(0))
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after
    )
    assert all(jax.tree.leaves(same))
    assert all(metric.shape == () for metric in metrics.values())


@everyone
def test_release_has_the_shapes_of_the_model(package, name):
    """Catches a release of the optimizer's copy, or of a stacked axis."""
    method, hp = registry.method(package, name, MODEL), hparams(package, name)
    state = alone(method, hp, jax.random.key(0), batches(method, hp))
    shapes = jax.tree.map(jnp.shape, method.release(state, lineage()).params)
    assert shapes == jax.tree.map(jnp.shape, lineage().current)


@everyone
def test_a_checkpoint_gives_back_the_state(package, name, tmp_path):
    """Catches what a method remembers and a killed run would forget: leaves and dtypes."""
    method, hp = registry.method(package, name, MODEL), hparams(package, name)
    state, rng = start(method, hp, jax.random.key(3)), jax.random.key(4)
    saver = checkpoint.Saver(tmp_path, every_seconds=0.0)
    saver.save(state, rng, 2, [{"step": 2}])
    other = start(method, hp, jax.random.key(5))
    found, key, step, log = saver.restore(other, jax.random.key(6))
    saver.close()
    jax.tree.map(np.testing.assert_array_equal, found, state)
    dtypes = [jax.tree.map(lambda x: x.dtype, one) for one in (found, state)]
    assert dtypes[0] == dtypes[1]
    assert (step, log) == (2, [{"step": 2}]) and bool(jnp.all(key == rng))


@everyone
def test_lora_leaves_the_base_alone(package, name):
    """Catches an adapter that forgets to stop at its targets, and a release of factors."""
    hp = hparams(package, name)
    if not hasattr(hp, "adapter"):
        return  # A weight edit has none.
    hp = hp.replace(adapter=adapters.LoRA(rank=2, targets=("up",)))
    method = registry.method(package, name, MODEL)
    state = alone(method, hp, jax.random.key(0), batches(method, hp))
    release, base = method.release(state, lineage()).params, lineage().current
    shapes = jax.tree.map(jnp.shape, release)
    assert shapes == jax.tree.map(jnp.shape, base)
    np.testing.assert_array_equal(
        release["layers"]["mix"]["down"]["kernel"],
        base["layers"]["mix"]["down"]["kernel"],
    )
    assert np.any(
        release["layers"]["mix"]["up"]["kernel"]
        != base["layers"]["mix"]["up"]["kernel"]
    )


@everyone
def test_docstring_has_the_header(package, name):
    """Catches a method that does not say its source, its null or its cost."""
    card = cards.card(registry.load(package, name))
    wanted = {
        "Name",
        "Summary",
        "Minimises",
        "Source",
        "Evidence",
        "Reduces to",
        "Cost",
    }
    wanted |= {"Threat"} if package == "attacks" else {"Stage", "Template", "Strategy"}
    assert not [field for field in wanted if not card.get(field)]


@everyone
def test_presets_say_their_source(package, name):
    """Catches a preset whose numbers come from nowhere."""
    presets = registry.load(package, name).PRESETS
    assert "sandbox" in presets
    assert all(plan.source for plan in presets.values())
