"""Readers of a user's files: labels and the errors that name what is wrong."""

import datasets
import pytest

from ftdefense.core import errors
from ftdefense.data import files
from ftdefense.evaluation import criteria

from .data_test import pairs
from .data_test import write

ROW = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "benign"),
        ({"label": "harmful"}, "harmful"),
        ({"label": None}, "benign"),
        ({"label": None, "is_harmful": True}, "harmful"),
        ({"is_harmful": False}, "benign"),
        ({"label": 1}, "harmful"),
    ],
)
def test_labels_are_read(tmp_path, fields, label):
    """Catches `LABELS[int(not label)]`, and a null label that is not left out."""
    (example,) = files.read(write(tmp_path / "r.jsonl", [ROW | fields]), label="benign")
    assert (example.label, example.topic) == (label, label)


def test_other_numberings_are_no_labels(tmp_path):
    """Catches `if label:`: class 3 of a news set would count as harmful."""
    with pytest.raises(errors.UserError, match="`label` is 3"):
        files.read(write(tmp_path / "r.jsonl", [ROW | {"label": 3}]), label="benign")


@pytest.mark.parametrize(
    ("given", "answers"),
    [({}, ()), ({"answers": "a b"}, ("a b",)), ({"answers": ["a", "b"]}, ("a", "b"))],
)
def test_answers_are_what_is_looked_for(tmp_path, given, answers):
    """Catches a text taken for its letters, and a judge that wants whole responses."""
    row = {"prompt": "p", "response": "It is a b, as they say."} | given
    (example,) = files.read(write(tmp_path / "r.jsonl", [row]), label="benign")
    assert example.answers == answers
    said = criteria.keyword(example, "a b")
    assert said == ("right" if answers else "wrong")


def test_messages_give_prompt_and_response(tmp_path):
    """Catches `messages[:1]`: earlier turns would be lost."""
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    answer = {"role": "assistant", "content": "d"}
    path = write(tmp_path / "r.jsonl", [{"messages": [*messages, answer]}])
    (example,) = files.read(path, label="benign")
    assert example.prompt == tuple(messages) and example.response == "d"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": 5}, "`messages`: not a list"),
        ({"messages": [{"role": "user"}]}, "`messages`: each needs"),
        ({"messages": [{"role": "assistant", "content": "r"}]}, "no prompt"),
        (ROW | {"answers": ["a", 5]}, "`answers`: text, or a list"),
        ({"prompt": 5, "response": "r"}, "`prompt` is empty or no text"),
    ],
)
def test_bad_fields_are_named(tmp_path, row, words):
    """Catches a TypeError where a field has another type."""
    with pytest.raises(errors.UserError, match=words) as caught:
        files.read(write(tmp_path / "r.jsonl", [ROW, row]), label="benign")
    assert "r.jsonl, line 2" in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    """Catches a UnicodeDecodeError; a byte-order mark is no error."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "response": "r"}\n"\xff"\n')
    with pytest.raises(errors.UserError, match="line 2: not UTF-8"):
        files.read(str(path), label="benign")


def test_empty_and_missing_files_are_named(tmp_path):
    """Catches an empty role that fails much later, or not at all."""
    for suffix in ("jsonl", "parquet"):
        with pytest.raises(errors.UserError, match=f"no such file: .*none.{suffix}"):
            files.read(str(tmp_path / f"none.{suffix}"), label="benign")
    with pytest.raises(errors.UserError, match="holds no rows"):
        files.read(write(tmp_path / "empty.jsonl", []), label="benign")


def test_parquet_without_columns_is_named(tmp_path):
    """Catches a KeyError; names row and field."""
    path = str(tmp_path / "r.parquet")
    datasets.Dataset.from_list([{"prompt": "p", "output": "r"}]).to_parquet(path)
    with pytest.raises(errors.UserError, match="row 0: lacks the field `response`"):
        files.read(path, label="benign")


def test_names_that_do_not_load_are_one_line(tmp_path, monkeypatch):
    """Catches a traceback of `datasets`, and a message without name and split."""

    def fail(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(errors.UserError) as caught:
        files.read("owner/name", label="benign", split="test")
    message = str(caught.value)
    assert message == "'owner/name' (split 'test') cannot be loaded: no network"


def test_splits_of_a_saved_dataset(tmp_path):
    """Catches a fixed `train`, and a KeyError for a split that is not there."""
    parts = {"a": pairs("a", 2), "b": pairs("b", 3)}
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    assert len(files.read(str(tmp_path / "saved"), label="benign", split="b")) == 3
    with pytest.raises(errors.UserError, match="split 'train'. cannot be loaded"):
        files.read(str(tmp_path / "saved"), label="benign")
