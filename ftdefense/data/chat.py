"""The one path from chat messages to token ids, for training and for evaluation."""

import functools
import hashlib
import pathlib
from typing import Any

import transformers

from ftdefense.core import errors
from ftdefense.data import examples as data_examples

Messages = tuple[dict[str, str], ...]


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
    text = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=False
    )
    return _encode(tokenizer, (text + prefill,))[0]


def render_rows(
    tokenizer: Any, examples: tuple[data_examples.Example, ...]
) -> list[tuple[list[int], int]]:
    """(ids, number of prompt ids) of each example; the rest is answer and end of turn.

    Raises:
      UserError: if a prompt's ids are not a prefix of the whole row's, which would
        train on other text than is generated from.
    """
    prompts, rows = [], []
    for example in examples:
        prompt = list(example.prompt)
        answer = {"role": "assistant", "content": example.response}
        prompts.append(
            tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False
            )
        )
        rows.append(tokenizer.apply_chat_template([*prompt, answer], tokenize=False))
    prompt_ids = _encode(tokenizer, tuple(prompts))
    row_ids = _encode(tokenizer, tuple(rows))
    for prompt, row, example in zip(prompt_ids, row_ids, examples, strict=True):
        if row[: len(prompt)] != prompt:
            raise errors.UserError(
                "the chat template renders a prompt differently with its answer "
                f"(prompt {example.key[:80]}); training and generation would differ. "
                "Give another with --chat_template=FILE."
            )
    return [(row, len(prompt)) for row, prompt in zip(row_ids, prompt_ids, strict=True)]


def _encode(tokenizer: Any, texts: tuple[str, ...]) -> list[list[int]]:
    # The template writes its own special tokens, so the tokenizer must add none.
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


@functools.cache
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of the chat template: part of every result's identity."""
    return _hash(str(tokenizer.chat_template))
