"""LoX: L1.

Mutants:
  `hp.alpha, truncate` -> `-hp.alpha, truncate`
  `jnp.arange(s.shape[-1]) < k` -> `jnp.arange(s.shape[-1]) <= k`
  `if not decays:` -> `if decays:`
  `tree.wide(aligned[common]) - tree` -> `tree.wide(aligned[common]) + tree`
  `"lm_head": 1` -> `"lm_head": 0`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.defenses import lox

from . import common


def test_identity_at_zero():
    """alpha = 0. Catches an extrapolation from the wrong weights."""
    origin = common.lineage()
    common.equal(lox.edit(origin, lox.Hparams(alpha=0.0)), origin.aligned)


def test_full_rank_moves_on_by_alpha():
    """k = 0: W + alpha (W - W0). Catches a transposed or partial reconstruction."""
    origin = common.lineage()
    edited = lox.edit(origin, lox.Hparams(alpha=0.5, k=0))
    expected = common.combine((1.5, origin.aligned), (-0.5, origin.pretrained))
    common.close(edited, expected, atol=1e-5)


def test_adds_rank_k_per_layer():
    """Catches an SVD of the stack, and `<=` for `<` in the cut."""
    origin = common.lineage()
    edited = lox.edit(origin, lox.Hparams(alpha=1.0, k=2))
    difference = jax.tree.map(lambda e, a: e - a, edited, origin.aligned)
    for matrix in difference["layers"]["mix"]["up"]["kernel"]:
        assert np.linalg.matrix_rank(np.asarray(matrix), tol=1e-4) == 2


def test_projection_is_the_truncated_svd():
    """U_k U_k' D. Catches directions of the wrong side, or of small values."""
    matrix = jax.random.normal(common.KEY, (6, 4))
    u, s, _ = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    kept = lox.truncate(matrix, 2)
    np.testing.assert_allclose(kept, u[:, :2] @ u[:, :2].T @ matrix, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(kept), np.linalg.norm(s[:2]), rtol=1e-5)


def test_vectors_are_copied():
    """Catches an extrapolated norm scale."""
    low, high = (
        {"norm": {"scale": jnp.full((2, 3), x)}, "k": {"kernel": jnp.full((3, 3), x)}}
        for x in (1.0, 2.0)
    )
    edited = lox.edit(types.Lineage(high, high, low), lox.Hparams(alpha=1.0, k=0))
    np.testing.assert_array_equal(edited["norm"]["scale"], 2.0)
    np.testing.assert_allclose(edited["k"]["kernel"], 3.0, rtol=1e-5)


def test_a_vocabulary_that_grew_is_extrapolated_where_both_have_it():
    """Catches a crash, the other axis of the head, and new rows that move."""

    def model(words, x):
        embed, head = jnp.full((words, 3), x), jnp.full((3, words), x)
        return {"embed": {"embedding": embed}, "lm_head": {"kernel": head}}

    low, high = model(5, 1.0), model(7, 2.0)
    hp = lox.Hparams(alpha=1.0, k=0)
    edited = lox.edit(types.Lineage(high, high, low), hp)
    expected = np.array([3.0] * 5 + [2.0] * 2)
    table, head = edited["embed"]["embedding"], edited["lm_head"]["kernel"]
    np.testing.assert_allclose(table, expected[:, None] * np.ones((1, 3)), rtol=1e-5)
    np.testing.assert_allclose(head, expected * np.ones((3, 1)), rtol=1e-5)
    other = {"embed": {"embedding": jnp.ones((7, 4))}, "lm_head": high["lm_head"]}
    with pytest.raises(errors.UserError, match="embed/embedding is"):
        lox.edit(types.Lineage(other, other, low), hp)


def test_missing_weights_are_named():
    """Catches an AttributeError where a flag would help."""
    with pytest.raises(errors.UserError, match="--pretrained"):
        lox.edit(types.Lineage(common.params()), lox.Hparams())
