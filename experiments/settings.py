"""Flags that every script shares, and what they stand for: folders, world, model."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import errno
import json
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp

from ftdefense.core import errors
from ftdefense.data import chat
from ftdefense.data import files
from ftdefense.data import own
from ftdefense.data import sandbox
from ftdefense.data import unrelated
from ftdefense.evaluation import forgetting
from ftdefense.models import huggingface
from ftdefense.models import sharding
from ftdefense.training import budgets
from ftdefense.training import checkpoint
from ftdefense.training import pipeline
from ftdefense.training import stages

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", None, "Folder for results and finished stages.")
flags.DEFINE_string(
    "stages", None, "Folder of finished stages, for work directories to share."
)
flags.DEFINE_string("preset", "small", "Sandbox size: tiny, small or medium.")
flags.DEFINE_integer("world_seed", 0, "Seed of the sandbox and its pretraining.")
flags.DEFINE_list("seeds", ["0"], "Seeds of defense and attack, comma-separated.")
flags.DEFINE_bool(
    "vmap_seeds", False, "Train all seeds of a stage in one compiled program."
)
flags.DEFINE_multi_string(
    "set",
    [],
    "Override a field: defense.alpha=0.2, attack.optimizer.learning_rate=1e-4, "
    "attack.steps=400, attack.adapter=lora, attack.data.harmful_count=100, or for one "
    "method only sidestepper.lam=3. May be repeated.",
)
flags.DEFINE_string(
    "model", None, "Hugging Face folder (config.json, safetensors); else the sandbox."
)
flags.DEFINE_enum(
    "model_stage",
    "pretrained",
    ["pretrained", "aligned"],
    "What --model holds: pretrained weights are aligned first, by the defense `none`.",
)
flags.DEFINE_string("pretrained", None, "Folder before alignment, where LoX needs it.")
flags.DEFINE_string(
    "harmful", None, "Harmful pairs: JSONL, parquet or `datasets` name."
)
flags.DEFINE_string("benign", None, "Benign pairs, likewise.")
flags.DEFINE_string("refusals", None, "Harmful prompts with refusals, likewise.")
flags.DEFINE_string("task", None, "A task that users fine-tune for, likewise.")
flags.DEFINE_string("heldout_harmful", None, "Harmful pairs to evaluate on, likewise.")
flags.DEFINE_string("heldout_benign", None, "Benign pairs to evaluate on, likewise.")
flags.DEFINE_integer(
    "length", 256, "Tokens of a training row (with --model).", lower_bound=2
)
flags.DEFINE_integer(
    "max_new_tokens", 64, "Tokens of an answer (with --model).", lower_bound=1
)
flags.DEFINE_bool("truncate", False, "Cut rows that are longer than --length.")
flags.DEFINE_string("chat_template", None, "Jinja file, if the tokenizer has none.")
flags.DEFINE_string(
    "collapse_word", own.COLLAPSE, "CTRAP collapses to its last token (with --model)."
)
flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Of matrix products."
)
flags.DEFINE_enum(
    "matmul_precision",
    "highest",
    ["highest", "default"],
    "float32 products in full float32 on GPUs and TPUs, too; `default` lets the device "
    "round them. bfloat16 compute is unaffected.",
)
flags.DEFINE_string(
    "mesh", "", "Devices by axis, as fsdp=4,tensor=2 (also data); empty: one device."
)
flags.DEFINE_integer(
    "eval_batch_size",
    None,
    "Held-out rows answered or scored together; default: 256, or 32 with --model.",
    lower_bound=1,
)
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard event files.")


def _refused_first(bench: pipeline.Bench, seeds: Sequence[int]) -> list[dict]:
    rows = unrelated.refused_first(bench.world)
    return [{"unrelated_refused": rows}] * len(seeds)


# Roles that are made when a method asks for them.
_DERIVED = {
    "vulnerable": forgetting.groups,
    "steady": forgetting.groups,
    "unrelated_refused": _refused_first,
}
# The disk's own errors; others are ours.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EROFS, errno.EPERM)
_OWN = {
    "harmful": "harmful",
    "benign": "benign",
    "refusals": "harmful",
    "task": "benign",
    "heldout_harmful": "harmful",
    "heldout_benign": "benign",
}


def run(main: Callable[[], Any]) -> None:
    """Runs `main` under absl; a user's error is one line and exit status 2."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every save otherwise.

    def fail(error: Exception) -> None:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(ValueError(f"unexpected argument {argv[1]!r}; see --help."))
        try:
            main()
        except errors.UserError as error:
            fail(error)
        except OSError as error:
            if error.errno not in (*_FULL, *_DENIED):
                raise
            remedy = (
                "check its permissions"
                if error.errno in _DENIED
                else "free some space: the same command goes on"
            )
            where = error.filename or FLAGS.workdir or "the disk"
            fail(ValueError(f"{where}: {error.strerror}; {remedy}."))

    def parse(argv: Sequence[str]) -> Sequence[str]:
        try:
            return FLAGS(argv)
        except flags.Error as error:
            return fail(error)

    app.define_help_flags()
    app.run(guarded, flags_parser=parse)


def warn(text: str) -> None:
    """Tells the user, once: processes of --jobs leave it to the one that started them."""
    if not ("worker" in FLAGS and FLAGS["worker"].value):
        print(f"warning: {text}", file=sys.stderr)


def workdir() -> pathlib.Path:
    """--workdir, which has no default: results never land by surprise."""
    if not FLAGS.workdir:
        raise errors.UserError("--workdir is missing: name a folder for the results.")
    return pathlib.Path(FLAGS.workdir)


def _stages() -> pathlib.Path:
    return pathlib.Path(FLAGS.stages) if FLAGS.stages else workdir()


def seeds() -> list[int]:
    """--seeds as numbers.

    Raises:
      UserError: for none, or for something that is no seed.
    """
    try:
        numbers = [int(seed) for seed in FLAGS.seeds]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise errors.UserError(
            f"--seeds={','.join(FLAGS.seeds)}: whole numbers are expected, as 0,1,2."
        )
    return numbers


def claim(folder: pathlib.Path, resolved: dict[str, Any]) -> None:
    """Writes config.json, or checks that the folder is of the same configuration.

    Raises:
      UserError: naming the first difference; nothing is overwritten.
    """
    path = folder / "config.json"
    resolved = json.loads(json.dumps(resolved))
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise errors.UserError(
                f"--workdir={folder} is not empty and holds no config.json; "
                "choose another."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(path, resolved)
        except OSError as error:
            raise errors.UserError(
                f"--workdir={folder} cannot be written ({error.strerror}); choose another."
            ) from error
        return
    there = json.loads(path.read_text())
    for name in sorted({*there, *resolved}):
        if there.get(name) != resolved.get(name):
            raise errors.UserError(
                f"--workdir={folder} holds another configuration ({name}: "
                f"{_brief(there.get(name))} there, {_brief(resolved.get(name))} now); "
                "choose another --workdir."
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def bench() -> pipeline.Bench:
    """World, model and stage runner that the flags describe."""
    exact = None if FLAGS.matmul_precision == "default" else FLAGS.matmul_precision
    jax.config.update("jax_default_matmul_precision", exact)
    if FLAGS.model is not None:
        return _own_bench()
    for name in (*_OWN, "pretrained"):
        if FLAGS[name].value is not None:
            raise errors.UserError(f"--{name} goes with --model=FOLDER; add it.")
    world = sandbox.build(FLAGS.preset, FLAGS.world_seed)
    if FLAGS.eval_batch_size:
        world = dataclasses.replace(world, eval_batch_size=FLAGS.eval_batch_size)
    model = budgets.model(FLAGS.preset, len(world.tokenizer))
    shape = dataclasses.replace(
        model.config, compute_dtype=FLAGS.compute_dtype, remat=FLAGS.remat
    )
    return pipeline.Bench(
        world,
        dataclasses.replace(model, config=shape),
        _stages(),
        budgets.preset(FLAGS.preset),
        world_seed=FLAGS.world_seed,
        derived=_DERIVED,
        together=FLAGS.vmap_seeds,
        placement=_placement(),
    )


def _placement() -> sharding.Placement | None:
    if not FLAGS.mesh:
        return None
    return sharding.Placement(sharding.mesh(**sharding.parse(FLAGS.mesh)))


def folder(flag: str) -> str:
    """The folder that a flag names.

    Raises:
      UserError: if it is not there.
    """
    named = FLAGS[flag].value
    if not pathlib.Path(named).is_dir():
        raise errors.UserError(
            f"--{flag}={named}: no such folder; give one as save_pretrained writes it."
        )
    return named


def _own_bench() -> pipeline.Bench:
    for name in ("harmful", "benign"):
        if not FLAGS[name].value:
            raise errors.UserError(
                f"--model needs --{name} as well: a JSONL or parquet file, or a "
                "`datasets` name."
            )
    source = folder("model")
    tokenizer = chat.load_tokenizer(source, FLAGS.chat_template)
    sources = {
        name: files.read(FLAGS[name].value, label=label)
        for name, label in _OWN.items()
        if FLAGS[name].value
    }
    world = own.build(
        own.Sources(**sources),
        tokenizer,
        length=FLAGS.length,
        max_new_tokens=FLAGS.max_new_tokens,
        eval_batch_size=FLAGS.eval_batch_size or budgets.OWN_EVALUATED,
        seed=FLAGS.world_seed,
        truncate=FLAGS.truncate,
        collapse_word=FLAGS.collapse_word,
    )
    for note in world.notes:
        warn(note)
    numerics = {"compute_dtype": FLAGS.compute_dtype, "remat": FLAGS.remat}
    model, params = huggingface.load(source, **numerics)
    if len(tokenizer) > model.config.vocab_size:
        raise errors.UserError(
            f"{FLAGS.model}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"only {model.config.vocab_size}; they do not belong together."
        )
    placement = _placement()
    given = stages.given(params, placement)
    aligned = FLAGS.model_stage == "aligned"
    pretrained = None if aligned else given
    if FLAGS.pretrained is not None:
        start = huggingface.load(folder("pretrained"))[1]
        if jax.tree.map(jnp.shape, start) != jax.tree.map(jnp.shape, params):
            raise errors.UserError(
                f"--pretrained={FLAGS.pretrained}: its weights are of another shape than "
                f"--model={FLAGS.model}; give the base that it was tuned from."
            )
        pretrained = stages.given(start, placement)
    return pipeline.Bench(
        world,
        model,
        _stages(),
        budgets.OWN_MODEL,
        pretrained=pretrained,
        aligned=given if aligned else None,
        world_seed=FLAGS.world_seed,
        derived=_DERIVED,
        together=FLAGS.vmap_seeds,
        placement=placement,
    )
