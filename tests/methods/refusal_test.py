"""The refusal direction (specs/attacks.md B.9, C.1): golden values and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.methods import refusal
from ftdefense.models import toy
from ftdefense.models import transformer

MODEL = toy.Toy()
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 6)).astype(np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def params():
    drawn = MODEL.init(jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn)


def test_scores_have_the_published_values():
    """Catches `log(1 - p)` without its epsilon, and a sum for the difference."""
    got = refusal.score(jnp.array([0.5, 0.9, 0.1, 1.0]))
    np.testing.assert_allclose(got, [0, 2.197225, -2.197225, 18.4207], atol=1e-4)
    wanted = np.log(0.9 + 1e-8) - np.log(0.1 + 1e-8)
    np.testing.assert_allclose(got[1], wanted, rtol=1e-12)


def test_ablation_is_idempotent_and_orthogonal():
    """Catches `+` for `-`, and a vector that is not of length one."""
    r_D, h = refusal.unit(draw(8, seed=1)), draw(2, 5, 8)
    once = refusal.ablation(r_D)(h, "mlp", 0, None)
    np.testing.assert_allclose(once @ r_D, 0, atol=1e-14)
    again = refusal.ablation(r_D)(once, "mlp", 0, None)
    np.testing.assert_allclose(again, once, atol=1e-14)
    assert not np.any(refusal.unit(jnp.zeros(8)))


def test_ablated_stream_equals_orthogonalised_weights():
    """C.1. Catches a site that is not ablated, and a matrix that is not edited."""
    r_D, weights = refusal.unit(draw(8, seed=2)), params()
    hooked = MODEL(weights, TOKENS, intervene=refusal.ablation(r_D))
    edited = refusal.orthogonalise(
        weights, r_D, jnp.ones(2), targets=("o", "down"), embedding=1.0
    )
    plain = MODEL(edited, TOKENS)
    np.testing.assert_allclose(hooked.logits, plain.logits, atol=1e-12, rtol=0)
    assert np.abs(plain.logits - MODEL(weights, TOKENS).logits).max() > 1e-2
    for name in ("embed", "mlp", "resid"):
        np.testing.assert_allclose(plain.hidden[name] @ r_D, 0, atol=1e-12)


def test_biases_that_write_are_edited_too():
    """Catches an output bias that still writes the direction into the stream."""
    model = transformer.LanguageModel(
        transformer.ModelConfig(11, 8, 2, 2, 1, 12, output_bias=True)
    )
    weights = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
    r_D = refusal.unit(draw(8, seed=3)).astype(jnp.float32)
    hook = functools.partial(model, intervene=refusal.ablation(r_D))
    hooked = jax.jit(hook)(weights, TOKENS).logits
    edited = refusal.orthogonalise(
        weights, r_D, jnp.ones(2), targets=("o", "down"), embedding=1.0
    )
    plain = jax.jit(model)(edited, TOKENS).logits
    np.testing.assert_allclose(hooked, plain, atol=2e-5, rtol=0)
    o = edited["layers"]["attention"]["o"]
    np.testing.assert_allclose(o["bias"] @ r_D, 0, atol=1e-6)
    q = edited["layers"]["attention"]["q"]["kernel"]
    np.testing.assert_array_equal(q, weights["layers"]["attention"]["q"]["kernel"])


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize(("alpha", "left"), [(1.0, 0.0), (1.5, 0.5), (2.0, 1.0)])
def test_strengths_leave_what_is_published(side, alpha, left):
    """B.9: 0, a half, a reflection. Catches the other side of W, and alpha squared."""
    r_D, weights = refusal.unit(draw(8, seed=4)), params()
    edited = refusal.orthogonalise(
        weights, r_D, alpha * jnp.array([1.0, 0.0]), targets=("down",), side=side
    )
    old, new = (p["layers"]["mix"]["down"]["kernel"] for p in (weights, edited))
    along = (lambda k: k @ r_D) if side == "out" else (lambda k: r_D @ k)
    before, after = (np.linalg.norm(along(k[0])) for k in (old, new))
    np.testing.assert_allclose(after, left * before, atol=1e-12)
    if alpha == 2:
        lengths = np.linalg.norm(new[0]), np.linalg.norm(old[0])
        np.testing.assert_allclose(*lengths, atol=1e-12)
    np.testing.assert_array_equal(new[1], old[1])
    np.testing.assert_array_equal(
        edited["embed"]["embedding"], weights["embed"]["embedding"]
    )


@pytest.mark.parametrize("source", [0, 1])
def test_addition_is_at_the_input_of_its_block(source):
    """Catches `layer` for `layer + 1`: a vector added one block too late."""
    vector_D, weights = draw(8, seed=5), params()
    added = MODEL(weights, TOKENS, intervene=refusal.addition(vector_D, source))
    moved = refusal.block_inputs(added) - refusal.block_inputs(MODEL(weights, TOKENS))
    np.testing.assert_allclose(moved[source] - vector_D[None, None], 0, atol=1e-12)
    np.testing.assert_array_equal(moved[:source], 0)


def test_prompts_end_before_their_answers():
    """Catches the position of the first answer token for the one before it."""
    weights = np.array([[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0]], np.float32)
    np.testing.assert_array_equal(
        refusal.prompt_ends(weights, 3), [[2, 1, 0], [0, 0, 0]]
    )


def test_openings_are_frequent_on_harmful_prompts_alone():
    """Catches `least` as a strict bound, and tokens that open benign answers too."""
    harmful = jax.nn.one_hot(jnp.array([1] * 17 + [2] + [3] + [3]), 5)
    benign = jax.nn.one_hot(jnp.array([3] * 20), 5)
    np.testing.assert_array_equal(
        refusal.openings(harmful, benign, 0.05), [0, 1, 1, 0, 0]
    )
