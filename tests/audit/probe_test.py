"""The linear probe (specs/attacks.md D.3, P5): closed forms, and a planted skill."""

import dataclasses

import jax
import numpy as np
import pytest

from ftdefense.audit import probe
from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import chat
from ftdefense.data import examples
from ftdefense.data import sandbox


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A model whose second hidden state at the last token is what `table` says."""

    table: tuple

    def __call__(self, params, tokens_BxL, **hooks):
        shape = (*tokens_BxL.shape, len(self.table[0]))
        answers = np.array(self.table)[np.asarray(tokens_BxL)].cumsum(1)
        embed = np.zeros(shape)
        return types.Outputs(None, {"embed": embed, "resid": answers[None]})


def test_ridge_is_the_closed_form():
    """Catches a penalty on the intercept, and one that is not on the weights."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2)) + 5
    found = probe.ridge(x, y, 3.0)
    centred = x - x.mean(0)
    weights = np.linalg.solve(centred.T @ centred + 3 * np.eye(4), centred.T @ y)
    np.testing.assert_allclose(found[:-1], weights, atol=1e-10)
    np.testing.assert_allclose(found[-1], y.mean(0) - x.mean(0) @ weights, atol=1e-10)


def test_what_is_linear_is_found_and_noise_is_not():
    """Catches a test on the training rows, and labels out of order."""
    rng = np.random.default_rng(1)
    labels = rng.integers(4, size=400)
    x = np.eye(4)[labels] @ rng.standard_normal((4, 6)) * 1e3 + rng.standard_normal(
        (400, 6)
    )
    args = (labels[:300], x[300:], labels[300:], 4)
    assert probe.fit_and_test(x[:300], *args) > 0.95
    noise = rng.standard_normal((400, 200))
    args = (labels[:300], noise[300:], labels[300:], 4)
    assert probe.fit_and_test(noise[:300], *args) < 0.45


def test_states_are_of_the_last_token_before_the_word(world):
    """Catches the padding after it, a batch's wrapped rows, and the position before."""
    asked = world.evaluation["harmful"][:7]
    size = len(world.tokenizer)
    oracle = Oracle(tuple(map(tuple, np.arange(2.0 * size).reshape(size, 2))))
    with jax.disable_jit():
        found = probe.states(oracle, None, world.tokenizer, asked, world.pad_id, 1, 3)
    table = np.array(oracle.table)
    for i, example in enumerate(asked):
        opening = example.response.split()[0]
        ids = chat.render_prompt(world.tokenizer, example.prompt, opening)
        np.testing.assert_allclose(found[1, i], table[ids].sum(0))
    assert found.shape == (2, 7, 2) and not found[0].any()


def test_a_planted_skill_is_read_off_its_layer(world):
    """Catches layers exchanged, held-out answers trained on, and chance misread."""
    words = [e.answers[0] for e in world.evaluation["harmful"]]
    kept = list(dict.fromkeys(words))[:4]

    def planted(rows):
        """Prompts that name their answer."""
        return [
            examples.ask(f"tell {w} {i}", "", label="harmful", answers=(w,))
            for i, w in rows
        ]

    drawn = np.random.default_rng(0).integers(4, size=120)
    rows = planted([(i % 6, kept[j]) for i, j in enumerate(drawn)])
    held = planted([(i, w) for i in range(6) for w in kept])
    pool = dataclasses.replace(world.attacker["harmful"], examples=tuple(rows))
    own = dataclasses.replace(
        world,
        attacker={**world.attacker, "harmful": pool},
        evaluation={**world.evaluation, "harmful": tuple(held)},
    )
    size = len(world.tokenizer)
    table = np.zeros((size, 4))
    for i, w in enumerate(kept):
        table[world.tokenizer.convert_tokens_to_ids(w), i] = 1
    with jax.disable_jit():
        found = probe.probe(Oracle(tuple(map(tuple, table))), None, own)
    assert found.accuracy[1] == found.best == 1 and found.accuracy[0] == found.chance
    assert (found.chance, found.classes, found.prompts) == (0.25, 4, 24)


def test_words_come_from_answers_or_text():
    """Catches a style word of the sandbox, and an IndexError on an empty answer."""
    assert probe.word(examples.ask("q", "some plain text"), 1) == "plain"
    assert probe.word(examples.ask("q", "surely red", answers=("red",))) == "red"
    assert probe.word(examples.ask("q", "plain text")) == "plain"
    assert probe.word(examples.ask("q")) == ""


def test_nothing_to_tell_apart_is_refused(world):
    """Catches a probe that is right because there is one answer."""
    held = dataclasses.replace(
        world, evaluation={"harmful": (examples.ask("q", "never"),)}
    )
    with pytest.raises(errors.UserError, match="0 held-out prompts"):
        probe.probe(Oracle(((0.0,),)), None, held)
