"""Writes the weights of a stage as a folder that transformers loads.

  python experiments/export.py --stage=runs/llama/stages/defended-vaccine-s0-1a2b3c4d5e6f \\
      --model=/models/my-llama --out=/models/my-llama-vaccine

`--model` is the folder that the run was given: its config, tokenizer and chat template
are kept. A stage of the sandbox takes `--preset` in its place.
"""

import json
import pathlib
from typing import Any

from absl import flags
import jax
import settings

from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.data import sandbox
from ftdefense.models import huggingface
from ftdefense.models import transformer
from ftdefense.training import budgets
from ftdefense.training import checkpoint

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.DEFINE_string("stage", None, "Folder in stages/ of a work directory.")
flags.DEFINE_string("out", None, "Folder to write.")
flags.DEFINE_bool("overwrite", False, "Replace --out where it is there.")

# Fields of a model's config that say how it is run, not what it is.
RUNNING = {"compute_dtype", "remat", "unroll"}


def main() -> None:
    for name in ("stage", "out"):
        if not FLAGS[name].value:
            raise errors.UserError(f"--{name} is missing: name a folder.")
    stage = pathlib.Path(FLAGS.stage)
    if not (stage / "release").is_dir():
        raise errors.UserError(
            f"--stage={stage} holds no release; name a finished folder in stages/ of a "
            "work directory."
        )
    if FLAGS.model:
        shape = huggingface.read_config(settings.folder("model"))
        model, tokenizer = transformer.LanguageModel(shape), None
    else:
        tokenizer = sandbox.build(FLAGS.preset, FLAGS.world_seed).tokenizer
        model = budgets.model(FLAGS.preset, len(tokenizer))
    _check(stage, config.to_dict(model.config))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = checkpoint.load_params(stage / "release", shapes)
    huggingface.save(
        FLAGS.out,
        model,
        params,
        source=FLAGS.model,
        tokenizer=tokenizer,
        overwrite=FLAGS.overwrite,
    )
    print(FLAGS.out)


def _check(stage: pathlib.Path, mine: dict[str, Any]) -> None:
    theirs = json.loads((stage / "config.json").read_text())["model"]
    mine = json.loads(json.dumps(mine))
    for name in (field for field in mine if field not in RUNNING):
        if theirs.get(name) != mine[name]:
            raise errors.UserError(
                f"--stage={stage} is of a model with {name}={theirs.get(name)}, not "
                f"{mine[name]}; give the --model or --preset that its run was given."
            )


if __name__ == "__main__":
    settings.run(main)
