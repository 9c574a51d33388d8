"""Antidote: the scores, the rows, the counts, what is left, the nulls.

Mutants:
      `jnp.square(wide), 0)` -> `jnp.abs(wide), 0)`
      `jnp.sqrt(sums_NxI)` -> `sums_NxI`
      `ranks_IxO >= spared` -> `ranks_IxO < width_in - spared`
      `jnp.argsort(jnp.argsort(scores_IxO, axis=0), axis=0)` -> `jnp.argsort(jnp.argsort(scores_IxO, axis=1), axis=1)`
      `1 - alpha + _ROUNDING` -> `1 - alpha`
      `jnp.where(removed, rest, tuned[path])` -> `jnp.where(removed, tuned[path], rest)`
      `jnp.cumsum(jnp.flip(weights_BxL > 0, -1), -1)` -> `jnp.flip(weights_BxL > 0, -1)`
      `x + found[path]` -> `found[path]`
      `lineage.current, batch.tokens` -> `lineage.aligned, batch.tokens`
      `jnp.abs(edits.difference` -> `(edits.difference`
      `x_TxI @ a_IxR)` -> `x_TxI @ pruned(a_IxR, x_TxI))`
      `* norms_I[:, None]` -> `* jnp.square(norms_I)[:, None]`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.defenses import antidote_pruning as antidote

from ..conftest import batch
from . import toy_lineage as toys

DATA = [batch(2), batch(5, rows=3)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def calibrated(count=2):
    """(method, state after `count` batches)."""
    method, origin = antidote.method(toys.MODEL), toys.lineage()
    step = jax.jit(method.step)
    state = method.init(origin, antidote.Hparams(), toys.KEY)
    for data in DATA[:count]:
        state, _ = step(state, origin, {"harmful": data}, toys.KEY)
    return method, state


def released(**changes):
    method, state = calibrated()
    state = state.replace(hp=state.hp.replace(**changes))
    return method.release(state, toys.lineage()).params


def kernels(params):
    return {name: m["kernel"] for name, m in params["layers"]["mix"].items()}


def test_padding_is_left_out():
    """Prompt and answer count. Catches the weights for a mask."""
    weights = jnp.array([[0, 0, 1.0, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    wanted = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(antidote.present(weights), wanted)


def test_inputs_are_summed_over_batches():
    """By hand, from the toy's formula. Catches other weights, a last batch alone."""
    params = toys.lineage().current
    total = {"up": 0.0, "down": 0.0}
    for data in DATA:
        hidden = toys.MODEL(params, data.tokens).hidden
        into = jnp.concatenate([hidden["embed"][None], hidden["resid"][:-1]])
        up = into + hidden["attn"]
        down = jnp.tanh(jnp.einsum("nbli,nio->nblo", up, kernels(params)["up"]))
        for name, x in (("up", up), ("down", down)):
            # The last token of every row is padding.
            total[name] += np.sum(np.square(x[:, :, :-1]), (1, 2))
    _, state = calibrated()
    for name, sums in total.items():
        found = state.params["layers", "mix", name, "kernel"]
        np.testing.assert_allclose(found, sums, rtol=1e-12)


@pytest.mark.parametrize(
    ("alpha", "removed"), [(0.0, 0), (0.1, 1), (0.15, 2), (0.6, 6), (0.9, 9), (1.0, 10)]
)
def test_rows_lose_equally_many(alpha, removed):
    """10 - int(10 (1 - alpha)). Catches a global share, and 0.4 * 10 = 3.9999998."""
    scores = jax.random.uniform(toys.KEY, (10, 7))
    found = antidote.highest(scores, jnp.float32(alpha))
    np.testing.assert_array_equal(jnp.sum(found, axis=0), removed)
    for score, gone in zip(scores.T, found.T, strict=True):
        np.testing.assert_array_equal(
            jnp.sort(score)[10 - removed :], jnp.sort(score[gone])
        )


def test_ties_do_not_change_the_count():
    """Catches a threshold on the score."""
    found = antidote.highest(jnp.ones((10, 3)), 0.3)
    np.testing.assert_array_equal(jnp.sum(found, axis=0), 3)


def test_highest_ignores_scales():
    """Of all inputs together, and of a row. Catches a score across rows."""
    scores = jax.random.uniform(toys.KEY, (10, 7))
    rows = 1.0 + jnp.arange(7.0)
    np.testing.assert_array_equal(
        antidote.highest(scores, 0.3), antidote.highest(3 * scores * rows[None], 0.3)
    )


def test_closed_form():
    """W by W, row by row, with NumPy. Catches s for sqrt(s), and the wrong side."""
    origin, (_, state) = toys.lineage(), calibrated()
    edited = kernels(released(alpha=0.3))
    for name, kernel in kernels(origin.current).items():
        sums = np.asarray(state.params["layers", "mix", name, "kernel"])
        for i in range(2):
            tuned, aligned = (
                np.asarray(x).T for x in (kernel[i], kernels(origin.aligned)[name][i])
            )
            scores = np.abs(tuned - aligned) * np.sqrt(sums[i])[None]
            expected = tuned.copy()
            for row in range(8):
                gone = np.argsort(scores[row])[int(8 * 0.7) :]
                expected[row, gone] = aligned[row, gone]
            np.testing.assert_array_equal(edited[name][i].T, expected)


def test_equal_inputs_are_magnitude_pruning():
    """Catches a score without the update, or with its sign."""
    method, state = calibrated()
    flat = jax.tree.map(jnp.ones_like, state.params)
    hp = state.hp.replace(alpha=0.5)
    origin = toys.lineage()
    edited = kernels(method.release(antidote.State(flat, hp), origin).params)
    for name, kernel in kernels(origin.current).items():
        update = np.abs(kernel - kernels(origin.aligned)[name])
        kept = np.asarray(edited[name] == kernel)
        assert np.all(kept.sum(1) == 4)
        largest_kept = np.where(kept, update, 0).max(1)
        assert np.all(largest_kept <= np.where(kept, np.inf, update).min(1))


def test_nulls():
    """alpha = 0: the user's bits; 1: the aligned kernels. Catches an added update."""
    origin = toys.lineage()
    toys.same(released(alpha=0.0), origin.current)
    all_gone = released(alpha=1.0)
    toys.same(kernels(all_gone), kernels(origin.aligned))
    toys.same(all_gone["lm_head"], origin.current["lm_head"])


def test_weights_themselves():
    """`weights`: zeros, 3 of 8 in each row. Catches a base that stays."""
    edited = kernels(released(alpha=0.3, prune="weights"))
    for kernel in edited.values():
        np.testing.assert_array_equal(jnp.sum(kernel == 0, axis=1), 3)


def test_factors():
    """The code's adapter in NumPy: rows of A [R, in] and of B [out, R], a stable sort,
    1 - mask. Catches norms of columns, squared, and an A pruned before B is judged."""
    rng = np.random.default_rng(0)
    big_a, big_b, x = (rng.normal(size=s) for s in ((8, 12), (20, 8), (9, 12)))
    x *= np.linspace(0.5, 2, 12)[rng.permutation(12)]
    big_a[:, 1] = 20.0 * rng.normal(size=8)  # Often pruned, and most of what reaches B.
    big_a[2] = 0.5
    x[:, 6:] = x[:, 6:7]  # Ties: the later inputs go.
    found = antidote.prune_factors(big_a.T, big_b.T, x, 0.3)
    for kernel, inputs, mine in zip(
        (big_a, big_b), (x, x @ big_a.T), found, strict=True
    ):
        scores = np.abs(kernel) * np.linalg.norm(inputs, axis=0)[None]
        mask = np.ones_like(kernel)
        order = np.argsort(scores, axis=1, kind="stable")
        spared = order[:, : int(kernel.shape[1] * (1 - 0.3))]
        np.put_along_axis(mask, spared, 0, axis=1)
        np.testing.assert_array_equal(mine.T, kernel * (1 - mask))


def test_what_is_missing_or_unknown_is_named():
    """Catches an AttributeError, and a silent default."""
    method = antidote.method(toys.MODEL)
    with pytest.raises(errors.UserError, match="--threat=service"):
        method.init(types.Lineage(toys.params()), antidote.Hparams(), toys.KEY)
    with pytest.raises(errors.UserError, match="weights"):
        method.streams(antidote.Hparams(prune="weight"))
