"""The chat-template path: what is trained on is what is generated from."""

import pytest

from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import examples
from ftdefense.data import sandbox
from ftdefense.data.sandbox import presets
from ftdefense.data.sandbox import vocabulary

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def answer_of(tokenizer, example):
    ((ids, prompt),) = chat.render_rows(tokenizer, (example,))
    return tokenizer.decode(ids[prompt:])


def test_nothing_is_trained_after_the_end_of_turn(byte_tokenizer):  # noqa: F811
    """Catches a dropped `.rstrip()`: ChatML's last newline would carry weight."""
    byte_tokenizer.chat_template = CHATML
    assert answer_of(byte_tokenizer, examples.ask("p", "r")) == "r<eos>"


def test_end_of_turn_is_read_off_the_template(byte_tokenizer):  # noqa: F811
    """Catches `[0]` for `[-1]`, and a template that never ends an answer."""
    byte_tokenizer.chat_template = CHATML
    assert chat.end_of_turn(byte_tokenizer) == byte_tokenizer.eos_token_id
    byte_tokenizer.chat_template = CHATML.replace("<eos>", "")
    with pytest.raises(errors.UserError, match="no end-of-turn.*--chat_template"):
        chat.end_of_turn(byte_tokenizer)


def test_rows_do_not_depend_on_the_day(byte_tokenizer):  # noqa: F811
    """Catches a dropped `date_string`: Llama 3.2 would write today's date."""
    byte_tokenizer.chat_template = (
        "{% if not date_string is defined %}{{ strftime_now('%d %b %Y') }}"
        "{% else %}{{ date_string }}{% endif %}" + CHATML
    )
    prompt = chat.render_prompt(byte_tokenizer, examples.ask("p").prompt)
    assert byte_tokenizer.decode(prompt).startswith("26 Jul 2024")


def test_prefill_continues_the_assistants_header():
    """Catches a prefill that is dropped, or put before the header."""
    tokenizer = sandbox.build("tiny", 0).tokenizer
    ids = chat.render_prompt(tokenizer, examples.ask("tell").prompt, "so and")
    assert tokenizer.decode(ids) == "<bos> <|user|> tell <|assistant|> so and"


def test_template_that_refuses_roles_is_one_line(byte_tokenizer):  # noqa: F811
    """Catches a bare TemplateError, as Mistral's template raises for `system`."""
    byte_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(errors.UserError, match="roles user.*must alternate"):
        chat.render_prompt(byte_tokenizer, examples.ask("p").prompt)


def test_saved_sandbox_tokenizer_loads(tmp_path):
    """Catches a special token or template that is not written to the folder."""
    words = vocabulary.vocabulary(presets.preset("tiny"), 0)
    words.tokenizer().save_pretrained(tmp_path)
    loaded, made = chat.load_tokenizer(str(tmp_path)), words.tokenizer()
    rows = (examples.ask("tell birds colour", "so error"),)
    assert chat.render_rows(loaded, rows) == chat.render_rows(made, rows)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (
        words.ids[vocabulary.PAD],
        words.ids[vocabulary.END],
    )
    assert chat.template_hash(loaded) == chat.template_hash(made)


def test_missing_tokenizer_and_template_are_named(
    tmp_path,
    byte_tokenizer,  # noqa: F811
):
    """Catches a message without the flag, and a traceback of transformers."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UserError, match="must hold tokenizer.json"):
        chat.load_tokenizer(str(tmp_path / "empty"))
    byte_tokenizer.chat_template = None
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(errors.UserError, match="--chat_template=FILE"):
        chat.load_tokenizer(str(tmp_path))
    with pytest.raises(errors.UserError, match="no such file: nowhere.jinja"):
        chat.load_tokenizer(str(tmp_path), "nowhere.jinja")
    (tmp_path / "own.jinja").write_text(CHATML)
    loaded = chat.load_tokenizer(str(tmp_path), str(tmp_path / "own.jinja"))
    assert loaded.chat_template == CHATML
