"""What the folders of transformers hold: names of files, and of every tensor."""

from collections.abc import Iterator
import json
import os
import pathlib
from typing import Any
from typing import NamedTuple

import jax

from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.models import transformer
from ftdefense.models.huggingface import architectures

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of both: the module's name here -> there, below layers/ and model.layers.N.
_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Tensor(NamedTuple):
    """One tensor of a checkpoint and where it belongs.

    Attributes:
      name: in the checkpoint.
      path: of our parameter.
      layer: index into its leading axis; None: it has none.
      transposed: whether theirs is [out, in] where ours is [in, out].
      shape: theirs.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def shapes(model: transformer.LanguageModel) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the model's parameters by path."""
    leaves = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(model.init, jax.random.key(0))
    )
    return {tree.path_names(path): leaf.shape for path, leaf in leaves}


def tensors(model: transformer.LanguageModel) -> Iterator[Tensor]:
    """Every tensor of the model's checkpoint, those of one parameter in a row."""
    for path, shape in shapes(model).items():
        stacked = path[0] == "layers"
        module = _MODULES["/".join(path[stacked:-1])]
        suffix = "bias" if path[-1] == "bias" else "weight"
        transposed = path[-1] == "kernel"
        inner = shape[1:] if stacked else shape
        theirs = inner[::-1] if transposed else inner
        if not stacked:
            yield Tensor(f"{module}.{suffix}", path, None, transposed, theirs)
            continue
        for layer in range(shape[0]):
            name = f"model.layers.{layer}.{module}.{suffix}"
            yield Tensor(name, path, layer, transposed, theirs)


def read_config(folder: str | os.PathLike) -> transformer.ModelConfig:
    """The model that a folder holds.

    Raises:
      UserError: if config.json is missing, unreadable or of an unsupported model.
    """
    path = pathlib.Path(folder) / CONFIG
    return architectures.parse(read_json(path), str(path))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; UserError where there is none."""
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise errors.UserError(
            f"{path} not found; give a folder that transformers' save_pretrained wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise errors.UserError(
            f"{path} cannot be read as JSON ({error}); download the file again."
        ) from error
    if not isinstance(read, dict):
        raise errors.UserError(
            f"{path} holds a JSON {type(read).__name__}, not an object; download the "
            "file again."
        )
    return read
