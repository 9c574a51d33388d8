"""Abliteration: its choice of a direction, against a slow reference, and its null."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import abliteration
from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import refusal
from ftdefense.methods import refusal_choice
from ftdefense.models import toy

from ..conftest import batch

MODEL = toy.Toy()
HP = abliteration.Hparams(positions=2, validation=0.25, frequent=0.1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def lineage():
    params = MODEL.init(jax.random.key(0))
    return types.Lineage(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params))


def data():
    """Harmful prompts end in token 1, benign ones in token 2."""
    found = {}
    for role, seed, mark in (("harmful", 0, 1), ("benign", 50, 2)):
        rows = batch(seed, rows=16)
        rows.tokens[:, 1] = mark
        found[role] = types.Batch(jnp.asarray(rows.tokens), jnp.asarray(rows.weights))
    return found


def stepped(hp, given=None):
    method = abliteration.method(MODEL)
    state = method.init(lineage(), hp, jax.random.key(0))
    run = jax.jit(method.step)
    return run(state, lineage(), given or data(), jax.random.key(1))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(hp):
    """Every candidate judged with edited weights, in NumPy: (scores, vectors)."""
    params, rows = lineage().current, data()
    outs = {role: MODEL(params, b.tokens) for role, b in rows.items()}
    last = {role: np.asarray(out.logits[:, 1]) for role, out in outs.items()}
    share = {
        role: np.bincount(x.argmax(-1), minlength=11) / 16 for role, x in last.items()
    }
    opens = (share["harmful"] >= 0.1) & (share["harmful"] > share["benign"])

    def score(logits):
        p = softmax(np.asarray(logits)) @ opens
        return np.log(p + 1e-8) - np.log(1 - p + 1e-8)

    kept = {"harmful": score(last["harmful"]) > 0, "benign": score(last["benign"]) < 0}
    for role, b in rows.items():
        prompts = [tuple(row) for row in np.asarray(b.tokens[:, :2]).tolist()]
        kept[role][4:] &= [prompt not in prompts[:4] for prompt in prompts[4:]]
    kept = {
        role: {
            part: k[cut] if k[cut].any() else np.ones_like(k[cut])
            for part, cut in (("val", slice(0, 4)), ("train", slice(4, None)))
        }
        for role, k in kept.items()
    }
    val = {role: b.tokens[:4] for role, b in rows.items()}
    judged, vectors = [], []
    for layer in range(2):
        for position in (1, 0):
            means = {}
            for role, out in outs.items():
                h = out.hidden
                stream = h["embed"] if layer == 0 else h["resid"][0]
                stream = np.asarray(stream)[4:, position]
                means[role] = stream[kept[role]["train"]].mean(0)
            vector = means["harmful"] - means["benign"]
            edited = refusal.orthogonalise(
                params,
                jnp.asarray(vector / max(np.linalg.norm(vector), 1e-300)),
                jnp.ones(2),
                targets=("down",),
                embedding=1.0,
            )
            bypass = score(MODEL(edited, val["harmful"]).logits[:, 1])
            added = MODEL(
                params, val["benign"], intervene=refusal.addition(vector, layer)
            )
            p = softmax(last["benign"][:4])
            q = softmax(np.asarray(MODEL(edited, val["benign"]).logits[:, 1]))
            moved = (p * (np.log(p) - np.log(q))).sum(-1)
            benign = kept["benign"]["val"]
            judged.append(
                (
                    bypass[kept["harmful"]["val"]].mean(),
                    score(added.logits[:, 1])[benign].mean(),
                    moved[benign].mean(),
                )
            )
            vectors.append(vector)
    return np.array(judged), np.array(vectors)


def test_candidates_and_scores_equal_a_reference():
    """Catches benign minus harmful, training rows that validate, KL the other way."""
    params, rows = lineage().current, data()

    def run(params, harmful, benign):
        found = refusal_choice.candidates(MODEL, params, harmful, benign, HP)
        judged = refusal_choice.scores(MODEL, params, harmful, benign, found, HP)
        return found[0], judged

    vectors, judged = jax.jit(run)(params, rows["harmful"], rows["benign"])
    wanted, directions = reference(HP)
    np.testing.assert_allclose(vectors, directions, atol=1e-6)
    for i, name in enumerate(("bypass", "induce", "kl")):
        np.testing.assert_allclose(judged[name], wanted[:, i], rtol=1e-4, atol=1e-6)


def test_no_prompt_both_builds_the_mean_and_validates():
    """Catches answers that tell prompts apart, and rows told by one token."""
    rows = data()["harmful"]
    ends = np.asarray(refusal.prompt_ends(jnp.asarray(rows.weights), 1))[:, 0]
    tokens = np.array(rows.tokens)
    tokens[9, : ends[1] + 1] = tokens[1, : ends[1] + 1]  # Asked again,
    tokens[9, ends[1] + 1 :] += 1  # and answered otherwise.
    found = refusal_choice.validates(rows.replace(tokens=tokens), 4)
    prompts = [tuple(row[: end + 1]) for row, end in zip(tokens, ends, strict=True)]
    assert prompts[9] in prompts[:4]
    np.testing.assert_array_equal(found, [p in prompts[:4] for p in prompts])


def judged(**changes):
    """Four layers, one position; each could be chosen, the last by bypass alone."""
    found = {
        "bypass": [-1.0, -2.0, -3.0, -4.0, -5.0],
        "induce": [1.0] * 5,
        "kl": [0.01] * 5,
    }
    return {name: jnp.array(changes.get(name, x)) for name, x in found.items()}


@pytest.mark.parametrize(
    ("changes", "layer", "best", "passed"),
    [
        ({}, -1, 3, True),  # int(.8 * 5) = 4 is too near the top.
        ({"kl": [0.01, 0.01, 0.01, 0.11, 0.01]}, -1, 2, True),
        ({"induce": [1.0, 1.0, -0.1, -0.1, 1.0]}, -1, 1, True),
        ({"bypass": [-1.0, -2.0, -3.0, float("nan"), -5.0]}, -1, 2, True),
        ({"kl": [1.0] * 5}, -1, 4, False),
        ({}, 0, 0, True),
        ({}, 4, 4, False),
    ],
)
def test_the_filter_is_the_published_one(changes, layer, best, passed):
    """Catches `<` for `>=`, the largest bypass, and a source near the top."""
    hp = HP.replace(layer=layer)
    got = refusal_choice.choose(
        judged(**changes), jnp.ones((5, 3)), jnp.arange(5), 5, hp
    )
    assert (int(got[0]), bool(got[1])) == (best, passed)


def test_nothing_is_taken_at_strength_zero():
    """Catches an edit that alpha does not scale."""
    state, _ = stepped(HP.replace(alpha=0.0))
    jax.tree.map(np.testing.assert_array_equal, state.params, lineage().current)


def test_the_edit_lowers_the_release_s_refusal():
    """Catches a direction that is chosen and not applied, or applied twice over."""
    judged, vectors = reference(HP)
    state, metrics = stepped(HP)
    best = int(2 * metrics["choice/layer"] - 1 - metrics["choice/position"])
    np.testing.assert_allclose(metrics["score/bypass"], judged[best, 0], rtol=1e-4)
    wanted = refusal.orthogonalise(
        lineage().current,
        jnp.asarray(vectors[best] / np.linalg.norm(vectors[best])),
        jnp.ones(2),
        targets=("down",),
        embedding=1.0,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, wanted
    )


def test_one_layer_leaves_the_others():
    """Catches Kuo's edit at every layer, and an embedding that it does not touch."""
    state, metrics = stepped(HP.replace(scope="layer", layer=1))
    new, old = state.params, lineage().current
    down = [p["layers"]["mix"]["down"]["kernel"] for p in (new, old)]
    np.testing.assert_array_equal(down[0][0], down[1][0])
    assert np.any(down[0][1] != down[1][1]) and metrics["choice/layer"] == 1
    np.testing.assert_array_equal(new["embed"]["embedding"], old["embed"]["embedding"])


def test_bad_settings_are_named():
    """Catches a KeyError, and a mean over no prompts."""
    with pytest.raises(errors.UserError, match="abliteration side"):
        abliteration.streams(HP.replace(side="ot"))
    with pytest.raises(errors.UserError, match="2 rows"):
        refusal_choice.held_out(1, 0.2)
    assert refusal_choice.held_out(160, 0.2) == 32
