"""The one path from chat messages to token ids, for training and for evaluation."""

from collections.abc import Sequence
import functools
import hashlib
import itertools
import pathlib
from typing import Any

import jinja2
import transformers

from ftdefense.core import errors
from ftdefense.data import examples as data_examples

Messages = tuple[dict[str, str], ...]

# Templates of Llama 3 write today's date otherwise, and rows would change overnight.
DATE = "26 Jul 2024"
# The role of a message that no chat template is put to, and that is the first.
RAW = "raw"


def load_tokenizer(source: str, chat_template: str | None = None) -> Any:
    """A tokenizer from a folder or hub name; `chat_template` is a Jinja file.

    Raises:
      UserError: if there is none, or it has no chat template and none is given.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise errors.UserError(
            f"no tokenizer in {source} ({reason}); the folder must hold "
            "tokenizer.json and tokenizer_config.json."
        ) from error
    if chat_template is not None:
        path = pathlib.Path(chat_template)
        if not path.is_file():
            raise errors.UserError(f"--chat_template: no such file: {path}")
        tokenizer.chat_template = path.read_text()
    if tokenizer.chat_template is None:
        raise errors.UserError(
            f"the tokenizer in {source} has no chat template; give one with "
            "--chat_template=FILE (Jinja)."
        )
    return tokenizer


def render_prompt(tokenizer: Any, messages: Messages, prefill: str = "") -> list[int]:
    """Ids that a model continues: the prompt, the assistant's header, `prefill`."""
    (ids,) = _encode(tokenizer, (_render(tokenizer, messages, True) + prefill,))
    _known(tokenizer, messages, ids)
    return ids


def render_rows(
    tokenizer: Any, examples: tuple[data_examples.Example, ...]
) -> list[tuple[list[int], int]]:
    """(ids, number of prompt ids) of each example; the rest is answer and end of turn.

    White space that a template puts after the end of turn (ChatML does) is left out:
    nothing generates it.

    Raises:
      UserError: if a prompt's ids are not a prefix of the whole row's, which would
        train on other text than is generated from.
    """
    prompts, rows = [], []
    for example in examples:
        answer = {"role": "assistant", "content": example.response}
        prompts.append(_render(tokenizer, example.prompt, True))
        rows.append(_render(tokenizer, (*example.prompt, answer), False).rstrip())
    prompt_ids = _encode(tokenizer, tuple(prompts))
    row_ids = _encode(tokenizer, tuple(rows))
    for prompt, row, example in zip(prompt_ids, row_ids, examples, strict=True):
        _known(tokenizer, example.prompt, prompt)
        if row[: len(prompt)] != prompt:
            raise errors.UserError(
                "the chat template renders a prompt differently with its answer "
                f"(prompt {example.key[:80]}); training and generation would differ. "
                "Give another with --chat_template=FILE."
            )
    return [(row, len(prompt)) for row, prompt in zip(row_ids, prompt_ids, strict=True)]


def end_of_turn(tokenizer: Any) -> int:
    """The id that the template ends an answer with.

    Raises:
      UserError: if it is no special token: a model could not learn to stop.
    """
    probe = data_examples.ask("a", "b")
    last = render_rows(tokenizer, (probe,))[0][0][-1]
    if last not in tokenizer.all_special_ids and last not in (
        tokenizer.added_tokens_decoder
    ):
        raise errors.UserError(
            "the chat template puts no end-of-turn token after an answer, so that no "
            "model learns to stop; give another with --chat_template=FILE."
        )
    return last


def after_instruction(tokenizer: Any, prompts: Sequence[Messages]) -> int:
    """How many tokens the template puts after an instruction: where all prompts agree.

    One more is among them, so that a question mark after each is not the template's.
    """
    other = ({"role": "user", "content": "x"},)
    rows = [render_prompt(tokenizer, messages)[::-1] for messages in (*prompts, other)]
    same = (len(set(ids)) == 1 for ids in zip(*rows, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def _render(tokenizer: Any, messages: Messages, generating: bool) -> str:
    first, *rest = messages
    if first["role"] == RAW:  # As it stands, and the end of the text after an answer.
        said = "".join(message["content"] + tokenizer.eos_token for message in rest)
        return f"{tokenizer.bos_token or ''}{first['content']}{said}"
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=generating,
            tokenize=False,
            date_string=DATE,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise errors.UserError(
            f"the chat template refuses messages of roles {roles}: {error}; change the "
            "data, or give another with --chat_template=FILE."
        ) from error


def _encode(tokenizer: Any, texts: tuple[str, ...]) -> list[list[int]]:
    # The template writes its own special tokens, so the tokenizer must add none.
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _known(tokenizer: Any, messages: Messages, ids: Sequence[int]) -> None:
    """A frame's own words may be foreign to a vocabulary: the sandbox's is small."""
    # A tokenizer may have one token for padding and for the beginning.
    fine = {None, tokenizer.bos_token_id}
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - fine
    if messages[0]["role"] == RAW and not unknown.isdisjoint(ids):
        raise errors.UserError(
            f"the tokenizer does not know all words of {messages[0]['content'][:60]!r}; "
            "of the frames that replace the chat template, template:plain adds none."
        )


@functools.cache
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of the chat template: part of every result's identity."""
    return _hash(str(tokenizer.chat_template))
