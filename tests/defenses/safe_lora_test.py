"""Safe LoRA: C, its cosines, which matrices are projected, the nulls.

Mutants:
      `moved_IxO /= jnp.where(length > 0, length, 1)` -> `moved_IxO /= jnp.where(length > 0, length**2, 1)`
      `update_IxO @ (alignment_IxO.T @ alignment_IxO)` -> `update_IxO @ (alignment_IxO.T @ update_IxO)`
      `(update_IxO @ alignment_IxO.T) @ alignment_IxO` -> `(update_IxO @ update_IxO.T) @ alignment_IxO`
      `jnp.clip(count, 1, cosines_M.size) - 1` -> `jnp.clip(count, 1, cosines_M.size)`
      `cosines_N <= most` -> `cosines_N < most`
      `& jnp.isfinite(cosines_N)` -> `& ~jnp.isnan(cosines_N)`
      `tree.add_scale(aligned[path], 1.0` -> `tree.add_scale(tuned[path], 1.0`
      `edits.difference(kernel_NxIxO, aligned[path])` -> `edits.difference(kernel_NxIxO, pretrained[path])`
      `jnp.round(_UNITS * tree.cosine(moved_IxO, update_IxO))` -> `_UNITS * tree.cosine(moved_IxO, update_IxO)`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.defenses import safe_lora

from . import toy_lineage as toys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def operator(alignment):
    """C, read off as the projection of the identity."""
    return safe_lora.project(jnp.eye(alignment.shape[1]), alignment)[0]


def kernels(params):
    return {name: m["kernel"] for name, m in params["layers"]["mix"].items()}


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_projection_closed_form(shape):
    """C D with C = V V' / ||V||, in the paper's layout. Catches an exchanged order."""
    d, v = np.asarray(normal(1, *shape)).T, np.asarray(normal(2, *shape)).T
    c = v @ v.T / np.linalg.norm(v)
    moved, cosine = safe_lora.project(d.T, v.T)
    np.testing.assert_allclose(moved, (c @ d).T, rtol=1e-12)
    expected = np.sum(c @ d * d) / (np.linalg.norm(c @ d) * np.linalg.norm(d))
    assert cosine == np.round(1e5 * expected)
    assert 0 <= cosine <= 1e5


def test_operator():
    """Symmetric, tr C = ||V||, C(s V) = s C(V). Catches ||V||^2, or no norm."""
    v = normal(2, 4, 4)
    c = operator(v)
    np.testing.assert_allclose(c, c.T, rtol=1e-12)
    np.testing.assert_allclose(jnp.trace(c), jnp.linalg.norm(v), rtol=1e-12)
    np.testing.assert_allclose(operator(3 * v), 3 * c, rtol=1e-12)


def test_operator_of_rank_one():
    """V = u w': C = ||w|| / ||u|| u u'. Catches the inputs' side."""
    u, w = normal(1, 4), normal(2, 3)
    expected = jnp.linalg.norm(w) / jnp.linalg.norm(u) * jnp.outer(u, u)
    np.testing.assert_allclose(operator(jnp.outer(u, w).T), expected, rtol=1e-12)


def test_cosine_ignores_lengths():
    """Of the update and of V; 1 if C is a multiple of I. Catches a missing norm."""
    d, v = normal(1, 4, 4), normal(2, 4, 4)
    _, cosine = safe_lora.project(d, v)
    assert safe_lora.project(1e-4 * d, 7 * v)[1] == cosine
    assert safe_lora.project(d, 2 * jnp.eye(4))[1] == 1e5


def test_nulls():
    """count = 0, threshold < 0: the user's bits. Catches a copy of the aligned ones."""
    origin = toys.lineage()
    for hp in (
        safe_lora.Hparams(count=0),
        safe_lora.Hparams(threshold=-0.1, select="threshold"),
    ):
        toys.same(safe_lora.edit(origin, hp), origin.current)


def cosines(origin):
    update, alignment = (
        {name: kernels(after)[name] - kernels(before)[name] for name in kernels(after)}
        for after, before in (
            (origin.current, origin.aligned),
            (origin.aligned, origin.pretrained),
        )
    )
    found = {
        name: jax.vmap(safe_lora.project)(update[name], alignment[name])
        for name in update
    }
    return {(n, i): float(c[i]) for n, (_, c) in found.items() for i in range(2)}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_smallest_cosines_are_projected(count):
    """Of four matrices, one by one. Catches `<`, the largest, and one too many."""
    origin = toys.lineage()
    edited = kernels(safe_lora.edit(origin, safe_lora.Hparams(count=count)))
    known = cosines(origin)
    chosen = set(sorted(known, key=known.get)[:count])
    for name, i in known:
        tuned, aligned, pretrained = (
            kernels(w)[name][i]
            for w in (origin.current, origin.aligned, origin.pretrained)
        )
        moved, _ = safe_lora.project(tuned - aligned, aligned - pretrained)
        if (name, i) in chosen:
            np.testing.assert_allclose(edited[name][i], aligned + moved, rtol=1e-12)
        else:
            np.testing.assert_array_equal(edited[name][i], tuned)


def test_threshold_counts_equality_and_rounds():
    """At a rounded cosine that one is projected. Catches `<`, and no rounding."""
    origin = toys.lineage()
    known = cosines(origin)
    middle = sorted(known.values())[1]
    for threshold, included in ((middle / 1e5, True), (middle / 1e5 - 1e-6, False)):
        hp = safe_lora.Hparams(threshold=jnp.float32(threshold), select="threshold")
        edited = kernels(safe_lora.edit(origin, hp))
        for (name, i), cosine in known.items():
            same = jnp.array_equal(edited[name][i], kernels(origin.current)[name][i])
            assert same != (cosine < middle or (cosine == middle and included))


def test_what_did_not_move_is_no_candidate():
    """Nor takes the place of one; an update without V stays. Catches a NaN, a zero."""
    origin = toys.lineage()
    mixed = {
        **origin.current["layers"]["mix"],
        "up": origin.aligned["layers"]["mix"]["up"],
    }
    current = {**origin.current, "layers": {"mix": mixed}}
    resting = types.Lineage(current, origin.aligned, origin.pretrained)
    edited = safe_lora.edit(resting, safe_lora.Hparams(count=2))
    toys.same(kernels(edited)["up"], kernels(origin.aligned)["up"])
    for i in range(2):
        assert not jnp.array_equal(
            kernels(edited)["down"][i], kernels(current)["down"][i]
        )
    unaligned = types.Lineage(origin.current, origin.aligned, origin.aligned)
    hp = safe_lora.Hparams(threshold=2.0, select="threshold")
    toys.same(safe_lora.edit(unaligned, hp), origin.current)
    toys.same(safe_lora.edit(unaligned, safe_lora.Hparams(count=4)), origin.current)


def test_other_leaves_keep_the_users_weights():
    """Embeddings and head; modules that are no target. Catches an edit of all."""
    origin = toys.lineage()
    edited = safe_lora.edit(origin, safe_lora.Hparams(count=4, targets=("up",)))
    toys.same(edited["embed"], origin.current["embed"])
    toys.same(edited["lm_head"], origin.current["lm_head"])
    toys.same(kernels(edited)["down"], kernels(origin.current)["down"])


def test_what_is_missing_is_named():
    """Catches an AttributeError where a flag would help."""
    params = toys.params()
    for origin, flag in (
        (types.Lineage(params, params), "--pretrained"),
        (types.Lineage(params, None, params), "--threat=service"),
    ):
        with pytest.raises(errors.UserError, match=flag):
            safe_lora.edit(origin, safe_lora.Hparams())
    with pytest.raises(errors.UserError, match="threshold"):
        safe_lora.edit(toys.lineage(), safe_lora.Hparams(select="treshold"))
    with pytest.raises(errors.UserError, match="down"):
        safe_lora.edit(toys.lineage(), safe_lora.Hparams(targets=("q",)))
