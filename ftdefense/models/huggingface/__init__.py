"""Folders of transformers: config.json, safetensors in one file or many, companions."""

from ftdefense.models.huggingface.layout import INDEX
from ftdefense.models.huggingface.layout import WEIGHTS
from ftdefense.models.huggingface.layout import read_config
from ftdefense.models.huggingface.layout import tensors
from ftdefense.models.huggingface.reading import load
from ftdefense.models.huggingface.writing import save

__all__ = ["INDEX", "WEIGHTS", "load", "read_config", "save", "tensors"]
