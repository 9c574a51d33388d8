"""O1 to O4, and the sweep: goldens A-u3, A-u4, A-u8 and B.7 of specs/attacks.md."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit.diagnostics import optimization
from ftdefense.core import tree
from ftdefense.models import toy
from tests.audit import descent
from tests.audit import toys


def joint(w):
    return toys.self_destruct_harmful(w) + toys.self_destruct_benign(w)


def row(score, **columns):
    return {"harmful_score": score, "capability": 1.0, **columns}


def swept(*scores, **columns):
    rates = [10.0**-i for i in range(len(scores), 0, -1)]
    return [
        row(score, learning_rate=rate, **columns)
        for rate, score in zip(rates, scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("steps", "naive", "both"),
    [
        (400, (1, 0, 0, 4), (1, 1, 0, 0)),
        (
            20,
            (0.878423, 0, 0.014781, 3.086510),
            (0.642488, 0.595017, 0.127815, 0.009014),
        ),
    ],
)
def test_self_destruct_goldens(steps, naive, both):
    """A-u3. Catches an ascent, a sum without its benign half, and one step too many."""
    for loss, expected in ((toys.self_destruct_harmful, naive), (joint, both)):
        weights, _ = descent.descend(
            loss, toys.scalars(x=0.0, y=0.0), jnp.array([0.05]), steps
        )
        end = {name: leaf[0] for name, leaf in weights.items()}
        found = (
            end["x"],
            end["y"],
            toys.self_destruct_harmful(end),
            toys.self_destruct_benign(end),
        )
        np.testing.assert_allclose(found, expected, atol=6e-7)


def test_trap_goldens():
    """A-u4. Catches a rate that is scaled by anything on its way to the step."""
    rates = jnp.array([0.01, 0.022, 0.05, 0.1, 0.5])
    weights, losses = descent.descend(toys.trap, toys.scalars(x=1e-3), rates, 2000)
    expected = [0.0311657, 0.0311657, 3, 3, 3]
    np.testing.assert_allclose(weights["x"], expected, atol=1e-6)
    np.testing.assert_allclose(losses[:2], 3.454393, atol=1e-6)
    curvature = jax.hessian(lambda x: toys.trap({"x": x}))(weights["x"][0])
    assert float(curvature) == pytest.approx(87.007, abs=1e-3)


def test_the_sweep_escapes_the_trap():
    """A-u8. Catches a sweep that ends at 1e-3, where all small rates do equally well."""
    found = descent.sweep(
        toys.trap, toys.scalars(x=1e-3), 2000, rates=[0.005, 0.01, 0.022, 0.05]
    )
    rate, loss = found.best
    assert rate == 0.05
    assert loss < 1e-8
    wide = descent.sweep(toys.trap, toys.scalars(x=1e-3), 2000)
    assert wide.best[1] < 1e-8
    assert not wide.edge
    assert wide.best[0] > 2 / 87.007  # Not below the trap's stability limit.


def test_scaled_parametrisation_is_found_by_the_sweep():
    """B.7. Catches an Adam without bias correction, and a sweep that stops at 1e-2."""
    start = toys.scalars(phi=0.0)
    for kind, rate, theta in (
        ("sgd", 1e-2, 2.0e-5),
        ("adam", 1e-2, 9.98e-3),
        ("adam", 2.0, 0.9727),
    ):
        weights, _ = descent.descend(toys.scaled, start, jnp.array([rate]), 1000, kind)
        assert 1e-3 * float(weights["phi"][0]) == pytest.approx(theta, rel=2e-3)
    found = descent.sweep(toys.scaled, start, 1000, kind="adam", extensions=5)
    assert found.best[0] >= 1
    assert found.best[1] < 1e-2
    # Steps of the length of the rate do not care how the weights are scaled.
    assert descent.sweep(toys.scaled, start, 1000, kind="normalised").best[1] < 1e-2


def test_grid_is_closed_and_about_threefold():
    """Catches a grid that leaves out its upper end."""
    rates = descent.grid()
    assert len(rates) == 7
    assert (rates[0], rates[-1]) == pytest.approx((1e-6, 1e-3))


def test_learning_rates_at_an_edge():
    """Catches a low edge that ties with others, and a saturated sweep at its end."""
    assert optimization.learning_rates(swept(0.0, 0.1, 0.4)).flagged
    assert "high" in optimization.learning_rates(swept(0.0, 0.1, 0.4)).note
    assert "low" in optimization.learning_rates(swept(0.4, 0.1, 0.0)).note
    assert not optimization.learning_rates(swept(0.1, 0.4, 0.2)).flagged
    assert not optimization.learning_rates(swept(0.5, 1.0, 1.0)).flagged
    assert optimization.learning_rates(swept(0.0, 0.0, 0.0)).flagged
    ruined = swept(0.0, 0.0, 0.0)
    ruined[-1]["capability"] = 0.2
    assert not optimization.learning_rates(ruined).flagged
    diverged = swept(0.1, 0.4, math.nan)
    assert not optimization.learning_rates(diverged).flagged


def test_default_that_misses_the_best():
    """Catches a default that is compared with the worst."""
    rows = swept(0.1, 0.4, 0.2)
    assert optimization.learning_rates(rows, default=rows[0]["learning_rate"]).flagged
    assert not optimization.learning_rates(
        rows, default=rows[1]["learning_rate"]
    ).flagged


def test_rates_are_averaged_over_seeds():
    """Catches the last seed's score in place of the mean."""
    rows = swept(0.0, 0.4, 0.0, seed=0) + swept(0.0, 0.2, 0.0, seed=1)
    assert optimization.by_rate(rows)[0.01] == pytest.approx(0.3)


def test_regularity_of_the_sweep_and_of_the_run():
    """Catches a dip that counts on a slope, and rises of rounding size."""
    assert optimization.regularity(swept(0.1, 0.6, 0.2, 0.5)).value == pytest.approx(
        0.3
    )
    assert optimization.regularity(swept(0.1, 0.6, 0.2, 0.5)).flagged
    assert optimization.regularity(swept(0.1, 0.6, 0.2, 0.2, 0.5)).flagged
    assert not optimization.regularity(swept(0.1, 0.6, 0.2, 0.1)).flagged
    healthy = [3.0, 2.0, 1.0, 1.001, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert not optimization.regularity([], healthy).flagged
    assert optimization.regularity([], [3.0, 2.0, 2.5, 1.0, 1.5]).flagged


def test_optimizer_gap():
    """Catches means over trials instead of the best of each optimizer."""
    rows = [
        row(s, optimizer=o) for s, o in ((0.0, "sgd"), (0.5, "sgd"), (0.9, "adamw"))
    ]
    assert optimization.optimizers(rows).value == pytest.approx(0.4)
    assert optimization.optimizers(rows).flagged
    assert not optimization.optimizers(rows[1:2] + [row(0.6, optimizer="lion")]).flagged
    assert not optimization.optimizers([]).flagged


def test_precision_sees_an_offset_that_swallows_updates():
    """Catches half a unit of float16, and entries that never move anyway."""
    params = jax.tree.map(lambda x: x, toy.Toy().init(jax.random.key(0)))
    update = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    assert not optimization.precision(params, update).flagged
    kernel = params["layers"]["mix"]["up"]["kernel"]
    params["layers"]["mix"]["up"]["kernel"] = kernel.at[0].add(100.0)
    found = optimization.precision(params, update)
    assert found.flagged
    assert found.value == pytest.approx(1 / 6)  # Of 2 + 2 stacked and 2 other tensors.
    same = optimization.precision(params, update, (params, update))
    assert same.value == 0
    still = jax.tree.map(jnp.zeros_like, params)
    assert not optimization.precision(params, still).flagged


def test_half_a_unit_in_the_last_place_is_the_limit():
    """Catches 2 ** -7 or 2 ** -9 for 2 ** -8, half a unit at 1 in bfloat16."""
    one = {"w": jnp.ones((2,))}
    for step, stuck in ((2**-8 * 0.99, {"w"}), (2**-8 * 1.01, set())):
        assert optimization.frozen(one, {"w": jnp.full((2,), step)}) == stuck
    assert float(tree.norm(one)) > 1
