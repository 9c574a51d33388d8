"""SEAM: X2 and the identities of its section, in float64.

Mutants:
  `hp.alpha * refused - hp.ascent * ascent` -> `hp.alpha * refused + hp.ascent * ascent`
  `jnp.log(lens.ascent(ctx.readout, w, outputs, unwanted))` -> `lens.ascent(ctx.readout, w, outputs, unwanted)`
  `weights=distances.attended(batches["benign"])` -> `weights=batches["benign"].weights`
  `wide = tree.wide(params)` -> `wide = params`
  `hp.benign, coupled.grads[1]` -> `hp.benign, coupled.grads[0]`
  `wanted = targets(refusal, harmful, hp.mask)` -> `wanted = targets(harmful, refusal, hp.mask)`
  `asked.weights * distances.attended(batch)[:, 1:]` -> `asked.weights`
  `(unit_b, -cosine, unit_a)` -> `(unit_b, cosine, unit_a)` in objectives/coupling.py
  `(unit_a, -cosine, unit_b)` -> `(unit_b, -cosine, unit_a)` in objectives/coupling.py
  `(params, epsilon, vector)` -> `(params, -epsilon, vector)` in objectives/coupling.py
  `per_b, turned_b)` -> `per_a, turned_b)` in objectives/coupling.py
  `(norm_a * norm_b + 1e-8)` -> `(norm_a + norm_b + 1e-8)` in objectives/coupling.py
  `jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)` -> `1 / norm` in objectives/coupling.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.defenses import seam
from ftdefense.methods import lift
from ftdefense.objectives import coupling
from ftdefense.objectives import lens
from ftdefense.objectives import losses

from ..conftest import batch
from . import common


def pairs():
    harmful, refusal = batch(1), batch(2)
    refusal.tokens[:, :2] = harmful.tokens[:, :2]
    harmful.weights[1, 3:] = refusal.weights[2, 3:] = 0
    return {"harmful": harmful, "refusal": refusal, "benign": batch(3)}


@jax.jit
def run(hp, data, weights):
    ctx = lift.context(common.MODEL, common.lineage(), hp)
    return seam.direction(ctx, weights, data, common.KEY)


def direction(**settings):
    hp = jax.tree.map(float, seam.Hparams(**settings))
    return run(hp, pairs(), common.params())


def gradient(loss):
    return jax.jit(jax.grad(loss))(common.params())


def outputs(w, rows):
    return common.MODEL(w, rows.tokens)


def refusal_loss(mask):
    data = pairs()
    asked = lens.targets(data["refusal"], data["harmful"], mask)
    # Padding is no target; the last token of every row is padding, and row 2's last 3.
    real = np.array([[1, 1, 1, 1, 0]] * 4)
    real[2, 2:] = 0
    asked = asked._replace(weights=asked.weights * real)

    def loss(w):
        return lens.cross_entropy(outputs(w, data["refusal"]).logits, asked)

    return loss


def cosine(loss_a, loss_b, w):
    a, b = (jax.grad(loss)(w) for loss in (loss_a, loss_b))
    return tree.dot(a, b) / (tree.norm(a) * tree.norm(b))


def some_losses():
    """Two functions of one tree whose Hessians depend on the point."""
    u, v = (jax.random.normal(jax.random.key(i), (6,)) for i in (0, 1))

    def loss_a(w):
        return jnp.sum(jnp.sin(u * w["x"])) + jnp.sum(w["x"]) * jnp.sum(w["y"] ** 2)

    def loss_b(w):
        return jnp.sum(jnp.exp(0.3 * v * w["x"])) + jnp.prod(w["y"]) * w["x"][0]

    w = {"x": jnp.linspace(-1.0, 1.0, 6), "y": jnp.array([0.7, -0.4])}
    return loss_a, loss_b, w


@pytest.mark.parametrize("mask", lens.MASKS)
def test_reduces_to_refusal_sft(mask):
    """ascent = beta = 0. Catches the harmful text's targets, or a term without weight,
    or padding as a target where the pair is longer.
    """
    settings = {"exact": mask == "response", "mask": mask, "ascent": 0.0, "beta": 0.0}
    grads, _ = direction(**settings)
    common.close(grads, gradient(refusal_loss(mask)), rtol=1e-9, atol=1e-13)


def test_without_coupling_it_ascends_and_refuses():
    """beta = 0. Catches the sign of ln A, A without its logarithm, or alpha left out."""
    data = pairs()
    asked = lens.targets(data["harmful"], data["refusal"], "response")

    def loss(w):
        found = outputs(w, data["harmful"])
        ascent = lens.ascent(common.MODEL.readout, w, found, asked)
        return 0.3 * refusal_loss("response")(w) - 0.6 * jnp.log(ascent)

    settings = {"mask": "response", "alpha": 0.3, "ascent": 0.6, "beta": 0.0}
    grads, _ = direction(exact=True, **settings)
    common.close(grads, gradient(loss), rtol=1e-9, atol=1e-13)


def test_couples_the_attack_with_every_benign_token():
    """The added gradient is that of the cosine. Catches a benign loss on answers only."""
    data = pairs()
    asked = lens.targets(data["harmful"], data["refusal"], "response")
    whole = np.ones((4, 6), np.float32)
    whole[:, -1] = 0
    benign = losses.next_token(common.MODEL)

    def attack(w):
        return lens.cross_entropy(outputs(w, data["harmful"]).logits, asked)

    def use(w):
        return benign(w, data["benign"].replace(weights=whole))

    null = {"mask": "response", "exact": True, "alpha": 0.0, "ascent": 0.0}
    grads, metrics = direction(beta=0.5, benign=0.2, **null)
    value, coupled = jax.jit(jax.value_and_grad(lambda w: cosine(attack, use, w)))(
        common.params()
    )
    expected = common.combine((0.5, coupled), (0.2, gradient(use)))
    common.close(grads, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics["cosine/harmful_benign"], value, rtol=1e-6)


def test_exact_form_is_the_gradient_of_the_cosine():
    """Catches norms or the cosine differentiated once more, and swapped Hessians."""
    loss_a, loss_b, w = some_losses()
    exact = jax.jit(lambda w: coupling.of_gradients(loss_a, loss_b, w, exact=True))
    found = exact(w)
    value, grad = jax.jit(jax.value_and_grad(lambda w: cosine(loss_a, loss_b, w)))(w)
    common.close(found.grad, grad, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.cosine, value, rtol=1e-7)


def test_finite_differences_err_in_proportion_to_epsilon():
    """Catches a step of another length, backwards, or a missing 1 / epsilon."""
    loss_a, loss_b, w = some_losses()
    exact = coupling.of_gradients(loss_a, loss_b, w, exact=True).grad
    sizes = (1e-1, 1e-2, 1e-3, 1e-4)
    errors_ = [
        tree.norm(tree.add_scale(found.grad, -1.0, exact)) / tree.norm(exact)
        for found in (coupling.of_gradients(loss_a, loss_b, w, e) for e in sizes)
    ]
    assert errors_[0] < 0.2
    ratios = np.array(errors_[:-1]) / np.array(errors_[1:])
    np.testing.assert_allclose(ratios, 10, rtol=0.15)


def test_finite_differences_are_exact_on_quadratics():
    """A d_a / n_a + B d_b / n_b for any epsilon. Catches either Hessian at the other."""
    rng = np.random.default_rng(0)
    half_a, half_b = rng.normal(size=(2, 5, 5))
    hessian_a, hessian_b = half_a @ half_a.T, half_b @ half_b.T
    t = rng.normal(size=5)
    found = coupling.of_gradients(
        lambda t: t @ hessian_a @ t / 2, lambda t: t @ hessian_b @ t / 2, t, epsilon=0.7
    )
    g_a, g_b = hessian_a @ t, hessian_b @ t
    n_a, n_b = np.linalg.norm(g_a), np.linalg.norm(g_b)
    a, b, c = g_a / n_a, g_b / n_b, g_a @ g_b / n_a / n_b
    expected = hessian_a @ (b - c * a) / n_a + hessian_b @ (a - c * b) / n_b
    np.testing.assert_allclose(found.grad, expected, rtol=1e-6)


def test_direction_of_the_harmful_gradient():
    """Unit Hessian and none: it is d_a / n_a, d_a across a, |d_a|^2 = 1 - c^2."""
    w, slope = jnp.array([1.0, 2.0, -0.5]), jnp.array([0.3, -1.0, 2.0])
    found = coupling.of_gradients(
        lambda w: jnp.sum(w**2) / 2, lambda w: jnp.sum(slope * w), w
    )
    across = jnp.linalg.norm(w) * found.grad
    np.testing.assert_allclose(jnp.sum(across**2), 1 - found.cosine**2, rtol=1e-6)
    np.testing.assert_allclose(across @ w, 0.0, atol=1e-7)


@pytest.mark.parametrize("exact", [False, True])
def test_scales_cancel_and_signs_flip(exact):
    """Catches one norm for both, and a cosine that is not divided."""
    loss_a, loss_b, w = some_losses()
    plain = coupling.of_gradients(loss_a, loss_b, w, 1e-3, exact).grad
    for scale in (7.0, -1.0):
        scaled = coupling.of_gradients(
            lambda w, scale=scale: scale * loss_a(w), loss_b, w, 1e-3, exact
        )
        expected = common.combine((np.sign(scale), plain))
        # The finite difference goes the other way about, an error of order epsilon.
        rtol = 1e-6 if exact or scale > 0 else 2e-2
        common.close(scaled.grad, expected, rtol, atol=rtol * 1e-1)


def test_a_loss_with_itself_has_no_coupling():
    """d = 0. Catches a direction that keeps a part along its own gradient."""
    loss_a, _, w = some_losses()
    found = coupling.of_gradients(loss_a, loss_a, w)
    np.testing.assert_allclose(found.cosine, 1.0, rtol=1e-6)
    common.close(found.grad, jax.tree.map(jnp.zeros_like, w), atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_vanishing_gradient_couples_nothing(exact):
    """Catches 0 / 0."""
    _, loss_b, w = some_losses()
    flat = coupling.of_gradients(lambda w: 0 * jnp.sum(w["x"]), loss_b, w, 1e-3, exact)
    assert flat.cosine == 0
    common.equal(flat.grad, jax.tree.map(jnp.zeros_like, w))


def test_gradients_are_of_float32_weights():
    """Catches a step of 1e-3 that bfloat16 rounds away."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), common.params())
    grads, _ = jax.eval_shape(run, seam.Hparams(), pairs(), low)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_microbatches_are_refused():
    """Catches a setting that is silently ignored."""
    with pytest.raises(errors.UserError, match="microbatches"):
        seam.streams(seam.Hparams(microbatches=2))
