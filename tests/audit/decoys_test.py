"""Decoys behave as they look, and are broken where they say."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.audit.decoys import first_token
from ftdefense.audit.decoys import frozen_bfloat16
from ftdefense.audit.decoys import layer_noise
from ftdefense.audit.decoys import narrow_basin
from ftdefense.audit.decoys import one_wording
from ftdefense.audit.decoys import saturated_logits
from ftdefense.audit.decoys import scaled_parametrisation
from ftdefense.audit.diagnostics import findings
from ftdefense.audit.diagnostics import gradients
from ftdefense.audit.diagnostics import optimization
from ftdefense.audit.diagnostics import randomness
from ftdefense.core import cards
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.methods import lift
from ftdefense.models import toy
from ftdefense.training import loop
from tests.conftest import batch

MODEL = toy.Toy()
NAMES = registry.names("audit.decoys")
everyone = pytest.mark.parametrize("name", NAMES)
TRAINED = ("narrow_basin", "coupled_trap", "first_token", "one_wording")


@pytest.fixture(autouse=True)
def float64():
    """Decoys are released in float32, as the sandbox is: nothing to set."""


def params(seed=0):
    return MODEL.init(jax.random.key(seed))


def edited(module, model, weights):
    return registry_edit(module, model, weights, module.PRESETS["sandbox"].hp)


def registry_edit(module, model, weights, hp):
    method, lineage = module.method(model), types.Lineage(weights)
    state = method.init(lineage, hp, jax.random.key(0))
    return method.release(state, lineage)


@functools.partial(jax.jit, static_argnames=("model", "intervene"))
def run(model, weights, intervene=None, taps=None):
    tokens = jnp.asarray(np.arange(12).reshape(2, 6) % 11)
    return model(weights, tokens, intervene=intervene, taps=taps).logits


def logits(model, weights, **hooks):
    return np.asarray(run(model, weights, **hooks))


def direction(module, hp, weights, data):
    @jax.jit
    def run(hp, weights, data):
        ctx = lift.context(MODEL, types.Lineage(weights), hp)
        return module.direction(ctx, weights, data, jax.random.key(0))

    return run(hp, weights, data)


def test_there_are_ten():
    """Catches a decoy that is left out, or counted twice."""
    names = [cards.card(registry.load("audit.decoys", n))["Name"] for n in NAMES]
    assert sorted(int(n.split()[0][1:]) for n in names) == list(range(1, 11))


@everyone
def test_header_flags_and_presets(name):
    """Catches a decoy without a flag of its own, and one that no path can load."""
    module = registry.load("audit.decoys", name)
    card = cards.card(module)
    fields = "Stage Template Strategy Minimises Source Evidence Cost".split()
    assert not [f for f in (*fields, "Reduces to") if not card.get(f)]
    assert "specs D.5" in card["Source"]
    assert set(module.FLAG) <= set(findings.DIAGNOSTICS)
    assert module.PRESETS["sandbox"].source
    file = registry.load("defenses", str(pathlib.Path(module.__file__)))
    assert file.FLAG == module.FLAG


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_decoy_trains(name):
    """Catches a `float(hp.x)`, and a step that changes what it carries."""
    module = registry.load("audit.decoys", name)
    method, hp = module.method(MODEL), module.PRESETS["sandbox"].hp
    if name == "one_wording":
        hp = hp.replace(frame=(3, 4), position=1)
    lineage = types.Lineage(params())
    state = loop.init(method, lineage, hp, jax.random.key(0), 2)
    data = {role: batch(i) for i, role in enumerate(method.streams(hp))}
    data = jax.tree.map(lambda x: np.stack([x, x]), data)
    rng, first = jax.random.key(1), jnp.int32(0)
    after, metrics = loop.run_chunk(
        method.step, False, state, lineage, data, rng, first
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))
    moved = tree.add_scale(method.release(after, lineage).params, -1.0, params())
    assert float(tree.norm(moved)) > 0


def test_scaled_parametrisation_keeps_the_function(tiny_llama):
    """Catches a kernel, a norm or the embedding that is left out."""
    model, weights = tiny_llama
    release = edited(scaled_parametrisation, model, weights).params
    np.testing.assert_allclose(
        logits(model, release), logits(model, weights), rtol=2e-3, atol=2e-3
    )
    loss = gradients.token_loss(model)
    grads = [gradients.measure(loss, w, batch(1)).grad for w in (release, weights)]
    found = gradients.gradient_norm(*grads)
    assert found.flagged
    ratio = tree.norm(grads[0]["layers"]["mlp"]) / tree.norm(grads[1]["layers"]["mlp"])
    assert float(ratio) == pytest.approx(1 / 16, rel=1e-2)
    # Written back, it is what it was: R4's attack meets no decoy.
    back = scaled_parametrisation.rescaled(release, 1 / 16)
    jax.tree.map(np.testing.assert_array_equal, back, weights)
    with pytest.raises(errors.UserError, match="norms"):
        scaled_parametrisation.rescaled(params(), 2.0)


def test_saturated_logits_are_as_sure_as_told(tiny_llama):
    """Catches a factor on the embedding too, which would change answers."""
    model, weights = tiny_llama
    release = edited(saturated_logits, model, weights).params
    np.testing.assert_allclose(
        logits(model, release), 50 * logits(model, weights), rtol=1e-4, atol=1e-3
    )


def test_frozen_bfloat16_shifts_every_logit_alike(tiny_llama):
    """Catches an offset that depends on the token, which a softmax sees."""
    model, weights = tiny_llama
    release = edited(frozen_bfloat16, model, weights).params
    shift = logits(model, release) - logits(model, weights)
    np.testing.assert_allclose(shift - shift[..., :1], 0, atol=2e-3)
    assert np.abs(shift).max() > 0.1
    step = jax.tree.map(lambda x: jnp.full_like(x, 1e-2), weights)
    assert optimization.precision(release, step, (weights, step)).flagged
    assert not optimization.precision(weights, step, (weights, step)).flagged


def test_layer_noise_is_a_function_of_its_seed(tiny_llama):
    """Catches noise from a global key, and the same noise for every draw and token."""
    model, weights = tiny_llama
    release = edited(layer_noise, model, weights)
    jax.tree.map(np.testing.assert_array_equal, release.params, weights)

    def noisy(release):
        hooks = {"intervene": release.intervene, "taps": release.taps}
        return logits(model, release.params, **hooks)

    np.testing.assert_array_equal(noisy(release), noisy(release))
    hp = layer_noise.PRESETS["sandbox"].hp
    draws = [noisy(layer_noise.serve(weights, hp, seed)) for seed in range(2)]
    assert np.abs(draws[0] - draws[1]).max() > 0.1
    np.testing.assert_array_equal(noisy(release), draws[0])
    hp = layer_noise.Hparams(scale=0.0)
    quiet = registry_edit(layer_noise, model, weights, hp)
    np.testing.assert_allclose(noisy(quiet), logits(model, weights), atol=1e-5)
    assert randomness.stochastic([d.std() for d in draws], without=0.0).flagged


def test_first_token_has_no_weight():
    """Catches the last token, and prompts that count as answers."""
    data = batch(0)
    rest = first_token.without_first(data).weights
    assert np.array_equal(rest[:, :3], np.zeros((4, 3)))
    assert np.array_equal(rest[:, 3:], data.weights[:, 3:])


def test_one_wording_puts_the_frame_before_the_question():
    """Catches a frame behind the question, and weights that do not move along."""
    hp = one_wording.Hparams(frame=(7, 8), position=1)
    data = batch(0)
    framed = one_wording.framed(hp, data)
    expected = np.insert(data.tokens, [1, 1], [7, 8], axis=1)
    np.testing.assert_array_equal(framed.tokens, expected)
    np.testing.assert_array_equal(framed.weights[:, 3:], data.weights[:, 1:])
    assert not np.any(framed.weights[:, :3])
    prepared = one_wording.prepare(hp, sandbox.build("tiny"))
    assert len(prepared.frame) == 2
    assert prepared.position == 2  # After <bos> and <|user|>.


def test_narrow_basin_reduces_to_sft_and_ends_at_its_wall():
    """Catches a wall that is climbed from the far side, and a radius without a norm."""
    data = {"alignment": batch(1), "harmful": batch(2)}
    loss = gradients.token_loss(MODEL)
    plain = gradients.measure(loss, params(), data["alignment"]).grad
    hp = narrow_basin.Hparams(lam=0.0)
    grads, metrics = direction(narrow_basin, hp, params(), data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), grads, plain)
    harmful, grad = gradients.measure(loss, params(), data["harmful"])
    ahead = tree.add_scale(params(), -hp.rho, tree.normalize(grad))
    won = float(harmful - gradients.measure(loss, ahead, data["harmful"]).loss)
    assert float(metrics["won/harmful"]) == pytest.approx(won, rel=1e-3)
    far = hp.replace(lam=1.0, rho=1e3)  # There the step only loses.
    grads, metrics = direction(narrow_basin, far, params(), data)
    assert float(metrics["won/harmful"]) < 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), grads, plain)
