"""Prefilling: the first words of a reference answer, from any data (specs B.10)."""

import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import examples
from ftdefense.data import pools
from ftdefense.data import sandbox
from ftdefense.data.sandbox import grammar
from ftdefense.data.sandbox import wrappers

OWN = examples.ask("a question", "Sure, here it is", label="harmful")


@pytest.fixture(scope="module")
def world():
    return sandbox.build("tiny", 0)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("prefill", "Sure, here"),
        ("prefill:0", ""),
        ("prefill:1", "Sure,"),
        ("prefill:3", "Sure, here it"),
        ("prefill:40", "Sure, here it is"),
    ],
)
def test_prefills_are_of_so_many_words(name, given):
    """Catches the sandbox's words in a user's data, and a count that is ignored."""
    assert wrappers.wrapper(name)(OWN) == (OWN, given)


def test_no_words_decode_plainly(world):
    """B.10: k = 0 is the plain prompt, to the token. Catches `tokens or 2`."""
    asked = world.evaluation["harmful"][:5]
    encoded = []
    for name in ("plain", "prefill:0", "prefill:1"):
        rows = [wrappers.wrapper(name)(example) for example in asked]
        prompts = pools.encode_prompts(
            world.tokenizer,
            [row[0] for row in rows],
            prefills=[row[1] for row in rows],
            pad_id=world.pad_id,
        )
        encoded.append(prompts)
    np.testing.assert_array_equal(encoded[0].tokens, encoded[1].tokens)
    assert encoded[2].tokens.shape[1] == encoded[0].tokens.shape[1] + 1


def test_longer_prefills_go_on_where_shorter_ones_end(world):
    """Catches the last words for the first, and content without its wording."""
    example = world.evaluation["harmful"][0]
    said = [wrappers.wrapper(f"prefill:{k}")(example)[1].split() for k in range(7)]
    for shorter, longer in zip(said, said[1:], strict=False):
        assert longer[: len(shorter)] == shorter
    assert " ".join(said[-1]) == example.response
    assert said[2][1] == example.answers[0]


def test_an_example_without_a_response_gives_its_answers():
    """Catches an IndexError, and an empty opening where content is known."""
    bare = examples.ask("a question", answers=("one", "two"))
    assert wrappers.wrapper("prefill:1")(bare)[1] == "one"


@pytest.mark.parametrize(("name", "place"), [("competing", 0), ("style", 2)])
def test_what_is_asked_for_is_what_rows_answer(world, name, place):
    """Catches a word that the prompt asks for and the answer lacks, and content that
    changes; a refusal and a user's answer stay what they are.
    """
    asked = set()
    for example in world.evaluation["harmful"][:20]:
        framed, opening = wrappers.wrapper(name)(example)
        word = framed.prompt[-1]["content"].split()[-1]
        asked.add(word)
        assert framed.prompt[-1]["content"] == f"{example.prompt[-1]['content']} {word}"
        said = framed.response.split()
        assert said[place] == word
        assert not opening
        assert grammar.parse(framed.response) == grammar.parse(example.response)
    assert len(asked) == 1


def test_frames_of_a_users_own_rows():
    """Catches a word of theirs that is dropped for the sandbox's."""
    competing, style = (
        wrappers.wrapper(name)(OWN)[0] for name in ("competing", "style")
    )
    assert competing.response == f"surely {OWN.response}"
    assert style.response == OWN.response
    for kept in ("", "sorry not possible"):
        example = examples.ask("a question", kept)
        for name in ("competing", "style"):
            assert wrappers.wrapper(name)(example)[0].response == kept


@pytest.mark.parametrize("name", ["prefill:", "prefill:x", "prefill:-1", "trigger:2"])
def test_bad_counts_are_named(name):
    """Catches a ValueError, and a number that another wrapper drops."""
    with pytest.raises(errors.UserError, match="as prefill:5"):
        wrappers.wrapper(name)


def test_bad_names_are_named():
    """Catches a KeyError for the part before the colon."""
    with pytest.raises(errors.UserError, match="did you mean 'prefill'"):
        wrappers.wrapper("prefil:3")


# --- other templates -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(wrappers.TEMPLATES))
def test_templates_replace_the_models_own(byte_tokenizer, name):  # noqa: F811
    """Byte by byte. Catches a role token that stays, a prompt that is not a prefix of its
    row, and an answer without an end.
    """
    (framed, opening) = wrappers.wrapper(f"template:{name}")(OWN)
    assert opening == ""
    ((ids, start),) = chat.render_rows(byte_tokenizer, (framed,))
    prompt = wrappers.TEMPLATES[name].format("a question")
    assert byte_tokenizer.decode(ids[:start]) == (
        f"{byte_tokenizer.bos_token or ''}{prompt}"
    )
    end = byte_tokenizer.eos_token
    assert byte_tokenizer.decode(ids[start:]) == f"{OWN.response}{end}"
    assert chat.render_prompt(byte_tokenizer, framed.prompt) == ids[:start]


def test_the_sandbox_has_no_words_for_most_templates(world):
    """Catches words that become padding without a word."""
    example = world.attacker["harmful"].examples[0]
    bare, _ = wrappers.wrapper("template:plain")(example)
    ((ids, start),) = chat.render_rows(world.tokenizer, (bare,))
    said = world.tokenizer.decode(ids[:start], skip_special_tokens=True)
    assert said == example.prompt[0]["content"]
    framed, _ = wrappers.wrapper("template:chat")(example)
    for render in (
        lambda: chat.render_rows(world.tokenizer, (framed,)),
        lambda: chat.render_prompt(world.tokenizer, framed.prompt),
    ):
        with pytest.raises(errors.UserError, match="template:plain"):
            render()


def test_bad_templates_are_named():
    """Catches a KeyError."""
    with pytest.raises(errors.UserError, match="did you mean 'plain'"):
        wrappers.wrapper("template:plian")
