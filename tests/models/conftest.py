"""A folder of a tiny Llama."""

import pytest

from tests.models import folders


@pytest.fixture
def folder(tmp_path):
    folders.save(tmp_path / "model")
    return tmp_path / "model"
