"""L1 and L2 on toys, and the plane on the small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit.diagnostics import gradients
from ftdefense.audit.diagnostics import landscape
from ftdefense.core import tree
from ftdefense.methods import adapters
from ftdefense.models import toy
from tests.audit import toys
from tests.conftest import batch

MODEL = toy.Toy()


def params(seed=0):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), MODEL.init(jax.random.key(seed))
    )


def trap(w, _data):
    return toys.trap(w)


def test_the_trap_has_a_barrier_of_known_height():
    """Catches `min` of the ends, and a path that starts at the attacked weights."""
    start, end = toys.scalars(x=0.0311657), toys.scalars(x=3.0)
    line = landscape.path(trap, start, end, None, None, points=201)
    assert line.harmful[0] == pytest.approx(3.454393, abs=1e-6)
    assert line.harmful[-1] == pytest.approx(0.0, abs=1e-12)
    x = 0.0311657 + line.t * (3.0 - 0.0311657)
    expected = 0.5 * (x - 3) ** 2 - np.exp(-50 * x**2)
    np.testing.assert_allclose(line.harmful, expected, atol=1e-12)
    height = expected.max() - expected[0]
    assert landscape.barrier(line.harmful) == pytest.approx(height)
    assert height > 0.2
    assert not landscape.linear_path(line, attack_failed=True).flagged


def test_no_barrier_and_a_failed_attack_is_flagged():
    """Catches a flag for a barrier instead of for none."""
    line = landscape.Path(*(np.array([2.0, 1.5, 1.0]) for _ in range(3)))
    assert landscape.barrier(line.harmful) == 0
    assert landscape.linear_path(line, attack_failed=True).flagged
    assert not landscape.linear_path(line, attack_failed=False).flagged
    np.testing.assert_array_equal(line.joint, [4.0, 3.0, 2.0])


def test_axes_are_orthonormal_over_all_leaves():
    """Catches Gram-Schmidt leaf by leaf, and a second axis that is not normalised."""
    first, second = params(1), params(2)
    e1, e2 = landscape.orthonormal(first, second)
    assert float(tree.dot(e1, e1)) == pytest.approx(1)
    assert float(tree.dot(e2, e2)) == pytest.approx(1)
    assert float(tree.dot(e1, e2)) == pytest.approx(0, abs=1e-14)
    rebuilt = jax.tree.map(
        lambda a, b: tree.dot(second, e1) * a + tree.dot(second, e2) * b, e1, e2
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), rebuilt, second
    )
    _, none = landscape.orthonormal(first, tree.add_scale(first, 2.0, first))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(none))


def test_plane_of_two_attacks_is_evaluated_where_it_says():
    """Catches x and y swapped in the grid, and axes that are not of unit length."""
    loss = gradients.token_loss(MODEL)
    release = params()
    naive = tree.add_scale(release, 0.1, params(1))
    adaptive = tree.add_scale(release, 0.1, params(2))
    data = batch(1), batch(2)
    surface = landscape.plane(loss, release, naive, adaptive, *data, points=4)
    for name, weights in (
        ("release", release),
        ("naive", naive),
        ("adaptive", adaptive),
    ):
        expected = [float(loss(weights, one)) for one in data]
        np.testing.assert_allclose(surface.losses[name], expected, rtol=1e-10)
    axes = landscape.orthonormal(
        landscape.update(naive, release), landscape.update(adaptive, release)
    )
    at = tree.add_scale(release, surface.x[3], axes[0])
    at = tree.add_scale(at, surface.y[1], axes[1])
    assert surface.harmful[1, 3] == pytest.approx(float(loss(at, data[0])), rel=1e-10)
    assert surface.joint[1, 3] == surface.harmful[1, 3] + surface.benign[1, 3]
    assert surface.points["naive"][1] == pytest.approx(0, abs=1e-12)


def test_an_adapter_that_has_learned_nothing_is_at_the_origin():
    """Catches axes from the factors themselves, whose random half would be a step."""
    adapter = adapters.LoRA(rank=2, targets=("up", "down"))
    release = params()
    factors = adapter.init(release, jax.random.key(5))
    merged = adapter.merge(factors, release)
    assert float(tree.norm(factors)) > 1
    assert float(tree.norm(landscape.update(merged, release))) == 0


def test_success_region_that_no_attack_reached():
    """Catches `or` for `and` in the predicate, and a region that an attack is in."""
    low, high = np.array([[0.1, 2.0], [2.0, 0.1]]), np.array([[2.0, 0.1], [0.1, 2.0]])
    points = {"release": (0, 0), "naive": (1, 0), "adaptive": (0, 1)}
    lost = {"release": (2.0, 0.1), "naive": (0.1, 2.0), "adaptive": (2.0, 0.1)}
    grid = np.arange(2.0)
    apart = landscape.Plane(grid, grid, low, high, points, lost)
    assert not landscape.success_region(apart, 0.5, 0.5).flagged
    joint = apart._replace(benign=low)
    found = landscape.success_region(joint, 0.5, 0.5)
    assert found.flagged
    assert found.value == 0.5
    won = joint._replace(losses={**lost, "adaptive": (0.2, 0.3)})
    assert not landscape.success_region(won, 0.5, 0.5).flagged


def test_self_destruct_plane_holds_the_joint_minimum():
    """Catches a plane that leaves out the second attack's end: (1, 1) of A-u3."""

    def harmful_or_benign(w, which):
        both = toys.self_destruct_harmful(w), toys.self_destruct_benign(w)
        return jnp.where(which == 0, *both)

    release = toys.scalars(x=0.0, y=0.0)
    naive, joint = toys.scalars(x=1.0, y=0.0), toys.scalars(x=1.0, y=1.0)
    surface = landscape.plane(
        harmful_or_benign, release, naive, joint, jnp.int32(0), jnp.int32(1), points=9
    )
    np.testing.assert_allclose(surface.losses["naive"], (0, 4), atol=1e-12)
    np.testing.assert_allclose(surface.losses["adaptive"], (0, 0), atol=1e-12)
    assert surface.points["adaptive"] == pytest.approx((1, 1))
    assert "reached by adaptive" in landscape.success_region(surface, 0.1, 0.1).note
