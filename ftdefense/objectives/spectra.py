"""How unevenly a product of two factors stretches space.

Source: "Evil Spectra", arXiv:2606.31591 (specs/attacks.md B.7).
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftdefense.core import tree


@jax.custom_batching.sequential_vmap
def _vectors(a_IxR: jax.Array, b_RxO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular vectors of `a b`, [I, R] and [O, R], by those of an R x R core."""
    # One product at a time: see conditioning._eigh.
    q_a, r_a = jnp.linalg.qr(a_IxR)
    q_b, r_b = jnp.linalg.qr(b_RxO.T)
    u, _, v_t = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
    return q_a @ u, q_b @ v_t.T


def concentration(a_IxR: jax.Array, b_RxO: jax.Array) -> jax.Array:
    """`||a b||_F / ||a b||_* - 1 / sqrt(R)`: from 0, all R singular values equal, up.

    In float32 or wider. 0, with no gradient, where the product vanishes, as LoRA's does
    at first. The gradient is U V' of singular vectors: finite where values coincide.
    """
    a_IxR, b_RxO = tree.wide((a_IxR, b_RxO))
    u_IxR, v_OxR = _vectors(*jax.lax.stop_gradient((a_IxR, b_RxO)))
    nuclear = jnp.sum((u_IxR.T @ a_IxR) * (b_RxO @ v_OxR).T)
    square = jnp.sum((a_IxR.T @ a_IxR) * (b_RxO @ b_RxO.T))
    there = square > 0
    length = jnp.sqrt(jnp.where(there, square, 1))
    ratio = length / jnp.where(there, nuclear, 1) - a_IxR.shape[1] ** -0.5
    return jnp.where(there, ratio, 0.0)


def mean_concentration(factors: Any) -> jax.Array:
    """The mean over all pairs {a [N, I, R], b [N, R, O]} of an adapter's tree.

    Kernels outside of blocks have no N.
    """
    found = []

    def visit(node: Any) -> None:
        if "a" in node and "b" in node:
            pairs = [node[x].reshape(-1, *node[x].shape[-2:]) for x in "ab"]
            found.append(jax.lax.map(lambda pair: concentration(*pair), pairs))
            return
        for child in node.values():
            visit(child)

    visit(factors)
    return jnp.mean(jnp.concatenate(found))
