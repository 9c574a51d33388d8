"""Examples from a user's files: JSONL, parquet, or anything that `datasets` loads."""

from collections.abc import Iterable
from collections.abc import Mapping
import json
import pathlib
from typing import Any

import datasets

from ftdefense.core import errors
from ftdefense.data import examples as data_examples

_SCHEMA = (
    "a row has `messages` (the last one by the assistant), or `prompt` and `response`; "
    "optionally `label` (harmful or benign), `topic`, and `answers` (words that a right "
    "answer has)"
)


def read(
    source: str, *, label: str, split: str = "train"
) -> tuple[data_examples.Example, ...]:
    """Examples of a .jsonl or .parquet file, or of a `datasets` name or folder.

    Args:
      label: of rows that do not say themselves.
      split: of a `datasets` source.

    Raises:
      UserError: names file, line (or row) and field of the first bad row.
    """
    path = pathlib.Path(source)
    if path.suffix in (".jsonl", ".json"):
        rows = _jsonl(path)
    else:
        rows = _dataset(source, path, split)
    found = tuple(_example(row, where, label) for where, row in rows)
    if not found:
        raise errors.UserError(f"{source} holds no rows; {_SCHEMA}.")
    return found


def _jsonl(path: pathlib.Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise errors.UserError(f"no such file: {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise errors.UserError(f"{where}: not UTF-8 text.") from error
            except json.JSONDecodeError as error:
                raise errors.UserError(
                    f"{where}: not JSON ({error.msg}); one object a line is expected."
                ) from error
            if not isinstance(row, dict):
                raise errors.UserError(f"{where}: not a JSON object; {_SCHEMA}.")
            yield where, row


def _dataset(
    source: str, path: pathlib.Path, split: str
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        if path.suffix == ".parquet":
            if not path.is_file():
                raise errors.UserError(f"no such file: {path}")
            loaded = datasets.load_dataset("parquet", data_files=source, split="train")
        elif (path / "dataset_info.json").is_file() or (
            path / "dataset_dict.json"
        ).is_file():
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(source, split=split)
    except errors.UserError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds; each means: no data.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise errors.UserError(
            f"{source!r} (split {split!r}) cannot be loaded: {reason}"
        ) from error
    for i, row in enumerate(loaded):
        yield f"{source}, row {i}", row


def _example(row: Mapping[str, Any], where: str, label: str) -> data_examples.Example:
    if row.get("messages"):
        messages = row["messages"]
        if not isinstance(messages, list):
            raise errors.UserError(f"{where}: field `messages`: not a list.")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(
                message
            ):
                raise errors.UserError(
                    f"{where}: field `messages`: each needs `role` and `content`."
                )
        if messages[-1]["role"] != "assistant":
            raise errors.UserError(
                f"{where}: field `messages`: the last one must be the assistant's."
            )
        prompt, response = messages[:-1], messages[-1]["content"]
    else:
        for field in ("prompt", "response"):
            if field not in row:
                raise errors.UserError(
                    f"{where}: lacks the field `{field}`; {_SCHEMA}."
                )
        prompt = [{"role": "user", "content": row["prompt"]}]
        response = row["response"]
    texts = [("prompt", m["content"]) for m in prompt] + [("response", response)]
    for field, text in texts:
        if not isinstance(text, str) or not text.strip():
            raise errors.UserError(f"{where}: the field `{field}` is empty or no text.")
    if not prompt:
        raise errors.UserError(f"{where}: field `messages`: there is no prompt in it.")
    given = [row[f] for f in ("label", "is_harmful") if row.get(f) is not None]
    label = given[0] if given else label
    # True and False are meant; 2 would be some other labelling, and is refused.
    if label in (0, 1):
        label = data_examples.LABELS[int(label)]
    if label not in data_examples.LABELS:
        raise errors.UserError(
            f"{where}: field `label` is {label!r}; known: harmful, benign."
        )
    answers = row.get("answers") or ()
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    if not all(isinstance(one, str) and one.strip() for one in answers):
        raise errors.UserError(f"{where}: field `answers`: text, or a list of texts.")
    return data_examples.Example(
        tuple({"role": m["role"], "content": m["content"]} for m in prompt),
        response,
        label,
        str(row.get("topic") or label),
        answers,
    )
