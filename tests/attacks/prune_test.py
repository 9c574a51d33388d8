"""Pruning and ActSVD (specs/attacks.md B.12): golden sets, slow references, nulls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.attacks import act_svd
from ftdefense.attacks import prune
from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import sandbox
from ftdefense.models import generate
from ftdefense.models import toy
from ftdefense.models import transformer
from ftdefense.objectives import losses

from ..conftest import batch
from .lineages import close
from .lineages import lineage
from .lineages import same

MODEL = toy.Toy()
ROWS = {"behaviour": batch(0), "benign": batch(7)}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def run(module, hp, steps=(ROWS,), origin=None):
    origin, method = origin or lineage(), module.method(MODEL)
    state = method.init(origin, hp, jax.random.key(0))
    step = jax.jit(method.step)
    for given in steps:
        given = {role: given[role] for role in method.streams(hp)}
        state, _ = step(state, origin, given, jax.random.key(1))
    return method.release(state, origin).params["layers"]["mix"]


def mixed(origin):
    return origin.current["layers"]["mix"]


def test_the_set_difference_is_the_published_one():
    """Catches the intersection, a share of the rest, and the lowest scores."""
    safety, utility = (
        jnp.array([[5, 4, 3], [2, 1, 0.0]]),
        jnp.array([[5, 0, 0], [4, 3, 2.0]]),
    )
    found = prune.located(safety, utility, 0.5, 0.5)
    np.testing.assert_array_equal(np.flatnonzero(found), [1, 2])
    assert prune.located(safety, utility, 1.0, 0.0).all()
    assert not prune.located(safety, utility, 0.5, 1.0).any()


def expected(origin, score):
    """Safety's top half without utility's top quarter, by loops over rows."""
    loss, found = jax.jit(jax.grad(losses.next_token(MODEL))), {}
    for role, rows in ROWS.items():
        sums = jax.tree.map(lambda x: np.zeros(x.shape), mixed(origin))
        if score == "snip":
            for i in range(4):
                one = types.Batch(rows.tokens[i : i + 1], rows.weights[i : i + 1])
                grads = loss(origin.current, one)["layers"]["mix"]
                sums = jax.tree.map(lambda s, g: s + np.abs(g), sums, grads)
        else:
            read = MODEL.inputs(origin.current, rows.tokens)["layers"]["mix"]
            for name, leaf in sums.items():
                for b, t in zip(*np.nonzero(rows.weights), strict=True):
                    x_NxI = np.asarray(read[name]["input"][:, b, t])
                    leaf["kernel"] += x_NxI[..., None] ** 2
                leaf["kernel"] = np.sqrt(leaf["kernel"])
        found[role] = jax.tree.map(lambda s, w: s * np.abs(w), sums, mixed(origin))

    def zeroed(kernel, safety, utility):
        out = np.array(kernel)
        for n in range(2):
            first = np.argsort(-safety[n].ravel())[:32]
            spared = np.argsort(-utility[n].ravel())[:16]
            out[n].ravel()[np.setdiff1d(first, spared)] = 0
        return out

    return jax.tree.map(zeroed, mixed(origin), found["behaviour"], found["benign"])


@pytest.mark.parametrize("score", prune.SCORES)
def test_pruned_weights_equal_a_reference(score, float64):
    """Catches |sum of gradients|, prompts among the positions, ranks over the stack."""
    origin = lineage()
    found = run(prune, prune.Hparams(q=0.5, p=0.25, score=score))
    same(found, expected(origin, score))
    left = np.count_nonzero(found["up"]["kernel"])
    assert 64 < left < 112  # Of 2 x 64 entries, at most a half goes.


@pytest.mark.parametrize(
    ("module", "hp"),
    [
        (prune, prune.Hparams(q=0.5, p=0.25)),
        (prune, prune.Hparams(q=0.5, p=0.25, score="wanda")),
        (act_svd, act_svd.Hparams(left_safety=6, left_utility=0.5)),
    ],
)
def test_calibration_adds_up_over_steps(module, hp, float64):
    """Catches a last batch that replaces the ones before it."""
    halves = [
        {r: jax.tree.map(lambda x, p=part: x[p], b) for r, b in ROWS.items()}
        for part in (slice(0, 2), slice(2, 4))
    ]
    close(run(module, hp, halves), run(module, hp), 1e-8)


def test_nothing_is_pruned_at_its_nulls(float64):
    """Catches `<=` in the count of a share."""
    for hp in (prune.Hparams(q=0.0), prune.Hparams(p=1.0, q=1.0)):
        same(run(prune, hp), mixed(lineage()))


def read(origin, role, name):
    """Inputs of layer 0 at answer positions, [T, I], and its kernel."""
    inputs = MODEL.inputs(origin.current, ROWS[role].tokens)["layers"]["mix"]
    x_BxLxI = np.asarray(inputs[name]["input"][0])
    kernel = np.asarray(mixed(origin)[name]["kernel"][0])
    return x_BxLxI[ROWS[role].weights > 0], kernel


def test_one_rank_is_the_top_singular_value(float64):
    """B.12. Catches the smallest direction, and one of the inputs."""
    origin = lineage()
    found = run(act_svd, act_svd.Hparams(rank=1, mode="remove"))
    for name in ("up", "down"):
        x, kernel = read(origin, "behaviour", name)
        new = np.asarray(found[name]["kernel"][0])
        values = np.linalg.svd(x @ kernel, compute_uv=False)
        lost = np.linalg.norm(x @ (kernel - new))
        np.testing.assert_allclose(lost, values[0], rtol=1e-8)
        rank = np.linalg.matrix_rank
        assert rank(x @ new, tol=1e-8) == rank(x @ kernel, tol=1e-8) - 1


def test_difference_equals_a_reference(float64):
    """W - (I - P_u) P_s W. Catches P_u for its complement, and the ranks kept."""
    origin = lineage()
    hp = act_svd.Hparams(left_safety=6, left_utility=0.5)
    found = run(act_svd, hp)
    for name in ("up", "down"):
        projectors = []
        for role, kept in (("behaviour", 2), ("benign", 4)):
            x, kernel = read(origin, role, name)
            u = np.linalg.svd((x @ kernel).T)[0][:, :kept]
            projectors.append(u @ u.T)
        safe, useful = projectors
        w = kernel.T
        wanted = w - (np.eye(8) - useful) @ safe @ w
        np.testing.assert_allclose(found[name]["kernel"][0], wanted.T, atol=1e-8)


def test_equal_sets_and_no_ranks_change_nothing(float64):
    """P_s = P_u. Catches a projection that is not taken away from itself."""
    equal = {"behaviour": ROWS["benign"], "benign": ROWS["benign"]}
    hp = act_svd.Hparams(left_safety=6, left_utility=6)
    origin = lineage()
    for found in (
        run(act_svd, hp, [equal]),
        run(act_svd, act_svd.Hparams(rank=0.0, mode="remove")),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
            found,
            mixed(origin),
        )


def test_behaviour_is_what_the_release_says():
    """Catches the attacker's own answers, prompts twice over, and a lost answer."""
    world = sandbox.build("tiny", 0)
    model = transformer.LanguageModel(
        transformer.ModelConfig(len(world.tokenizer), 16, 1, 2, 1, 16, max_length=32)
    )
    params = model.init(jax.random.key(0))
    pool = prune.derive(model, world, params, prune.PRESETS["sandbox"], 0)["behaviour"]
    asked = world.attacker["harmful"].examples
    keys = [e.key for e in pool.examples]
    assert keys == list(dict.fromkeys(e.key for e in asked))[:128]
    row = pool.tokens[3]
    start = int(np.argmax(pool.weights[3]))
    said = generate.generate(
        model,
        params,
        row[None, :start],
        np.ones((1, start), bool),
        max_new_tokens=world.max_new_tokens,
        eos_ids=world.eos_ids,
        pad_id=world.pad_id,
    )
    text = world.tokenizer.batch_decode(np.asarray(said), skip_special_tokens=True)[0]
    assert pool.examples[3].response == text.strip()
    assert pool.tokens.shape == (128, world.length)


def test_bad_names_are_named():
    """Catches a score or mode that silently is the other one."""
    with pytest.raises(errors.UserError, match="did you mean 'wanda'"):
        prune.streams(prune.Hparams(score="wnda"))
    with pytest.raises(errors.UserError, match="act_svd mode"):
        act_svd.streams(act_svd.Hparams(mode="removed"))
