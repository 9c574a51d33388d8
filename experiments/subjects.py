"""What an audit is of, and the models with which it is compared."""

from collections.abc import Callable
import dataclasses
import pathlib
import re
import statistics
from typing import Any

from absl import flags
import cells
import choices
import jax
import settings
import threats

from ftdefense.audit import attack_family
from ftdefense.audit import search
from ftdefense.audit import templates as attack_templates
from ftdefense.core import cards
from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.data import chat
from ftdefense.methods import plans
from ftdefense.models import huggingface
from ftdefense.training import checkpoint
from ftdefense.training import pipeline
from ftdefense.training import serving
from ftdefense.training import stages

FLAGS = flags.FLAGS
flags.DEFINE_string("defense", None, "Defense to train: name, name:preset or file.py.")
flags.DEFINE_string(
    "checkpoint",
    None,
    "Released weights instead: a Hugging Face folder, or a stage of a work directory.",
)
flags.DEFINE_string(
    "reference", None, "Undefended twin of --checkpoint, a Hugging Face folder."
)
flags.DEFINE_list(
    "template", [], "Of the defense, T1 to T4, if its card does not say: adds attacks."
)

REFERENCES = ("none", "never")  # With what a release is compared, in the sandbox.


@dataclasses.dataclass(frozen=True)
class Subject:
    """A release to be audited, or one to compare it with.

    Attributes:
      name: for people; of a defense, its reference.
      stages: its weights, for each seed; one release may stand for all.
      before: its rows before any attack, for each seed.
      defense: what made it, under the name that results carry.
      service: whoever fine-tunes it; None: its weights are open.
    """

    name: str
    stages: list[stages.Stage]
    before: list[dict[str, Any]]
    defense: choices.Chosen
    service: tuple[serving.Provider, serving.Edits] | None = None

    @property
    def has_checkpoints(self) -> bool:
        """Whether a long fine-tuning can be judged along its way: not before an edit."""
        return self.service is None or not self.service[1]

    def target(self) -> search.Target:
        capability = self.before[0]["capability"]
        return search.Target(self.name, self.stages[0], capability, self.service)


def check() -> None:
    """Refuses what no audit can be of.

    Raises:
      UserError: if flags contradict one another.
    """
    if bool(FLAGS.defense) == bool(FLAGS.checkpoint):
        raise errors.UserError("give one of --defense=NAME and --checkpoint=FOLDER.")
    if FLAGS.checkpoint and FLAGS.model is not None:
        raise errors.UserError(
            "--model goes with --defense, which is trained on it; the undefended model of "
            "a --checkpoint is given with --reference."
        )
    released = _is_own_release()
    if FLAGS.reference and not released:
        raise errors.UserError(
            "--reference goes with --checkpoint and --harmful; the sandbox trains its own "
            "references."
        )
    if released and not FLAGS.reference and _is_stage(FLAGS.checkpoint):
        raise errors.UserError(
            f"--checkpoint={FLAGS.checkpoint} is a stage, which holds weights alone: give "
            "the undefended model's folder with --reference, for tokenizer and shape."
        )
    if any(one.startswith("attack.") for one in FLAGS.set):
        raise errors.UserError(
            "--set=attack...: an audit sets its attacks itself; --set reaches the "
            "defense, --attack=FILE.py adds an attack of your own."
        )
    unknown = [one for one in FLAGS.template if not re.fullmatch("T[1-4]", one)]
    if unknown:
        raise errors.UserError(
            f"--template={unknown[0]}: T1, T2, T3 or T4 is expected."
        )
    if FLAGS.template and in_service():
        raise errors.UserError(
            f"--template: of --defense={_name()}, which acts in a service, no weights are "
            "attacked; leave it out."
        )


def own_family(reference: str) -> tuple[str, attack_family.Family]:
    """A user's own attack as a family; of a service only its rows and steps count.

    Raises:
      UserError: if there is no such attack, or a service would not carry it out.
    """
    name, family = attack_family.of_attack(reference)
    if not in_service():
        return name, family
    if not threats.of_rows(family.attack):
        raise errors.UserError(
            f"--attack={reference}: of an attack on a service only rows and steps count; "
            "give one that is made of rows, as sft:PRESET, or use run.py "
            f"--defense={_name()} --attack={reference}."
        )
    return name, dataclasses.replace(family, space={}, points=[{}], trials=(1, 1, 1))


def in_service() -> bool:
    """Whether the defense acts while a provider fine-tunes: only rows reach it then."""
    return bool(FLAGS.defense) and not threats.fits(_name(), "open_weight")


def threat() -> str:
    """The threat model of the audit: the one that the defense was made for."""
    return "service" if in_service() else "open_weight"


def _name() -> str:
    return FLAGS.defense.partition(":")[0]


def has_own_data() -> bool:
    """Whether a user's own rows judge, outside of the sandbox."""
    return FLAGS.harmful is not None


def _is_own_release() -> bool:
    """Whether it is a checkpoint that they judge."""
    return bool(FLAGS.checkpoint) and has_own_data()


def bench() -> pipeline.Bench:
    """The sandbox's, or one made from the checkpoint's own data."""
    if not _is_own_release():
        return settings.bench()
    # The undefended model is what stands before a defense; without one, the release.
    FLAGS.model = FLAGS.reference or FLAGS.checkpoint
    FLAGS.model_stage = "aligned"
    return settings.bench()


def shape(bench: pipeline.Bench) -> dict[str, int]:
    """What families of attacks have to know of the model and its data."""
    world = bench.world
    asked = [e.prompt for e in world.evaluation["harmful"]]
    said = [len(e.response.split()) for e in world.attacker["harmful"].examples]
    return {
        "layers": bench.model.config.layers,
        "positions": max(1, chat.after_instruction(world.tokenizer, asked)),
        "words": round(statistics.median(said)),
        "rows": len(said),
        "benign": len(world.attacker["benign"]),
    }


def given(bench: pipeline.Bench) -> choices.Chosen | stages.Stage:
    """What to audit: a defense that can be trained, or weights that are there.

    Raises:
      UserError: if it is neither.
    """
    if FLAGS.checkpoint:
        params = weights(bench, pathlib.Path(FLAGS.checkpoint))
        return stages.given(params, bench.placement)
    (chosen,) = choices.chosen(bench, "defenses", [FLAGS.defense])
    bench.check(chosen.name, chosen.plan)
    return chosen


def audited(
    given: choices.Chosen | stages.Stage, runner: cells.Cells, seeds: tuple[int, ...]
) -> Subject:
    """What is audited: at `quick` one release stands for all seeds of the attacks."""
    if isinstance(given, stages.Stage):
        name = pathlib.Path(FLAGS.checkpoint).name
        before = runner.before(name, [given], seeds[:1])
        there = choices.Chosen(name, name, plans.Plan(None))
        return _for_all(Subject(name, [given], before, there), seeds)
    quick = FLAGS.budget == "quick"
    one = _trained(given, runner, seeds[:1] if quick else seeds)
    return _for_all(one, seeds) if quick else one


def _trained(
    chosen: choices.Chosen, runner: cells.Cells, seeds: tuple[int, ...]
) -> Subject:
    releases, before = runner.defend(chosen, seeds)
    name = _short(chosen.reference)
    service = (
        threats.provider(runner.bench, chosen.name, chosen.plan, chosen.recipe)
        if in_service()
        else None
    )
    made = dataclasses.replace(chosen, reference=name)
    return Subject(name, releases, before, made, service)


def _short(reference: str) -> str:
    """Of a file its name, as people say it."""
    return pathlib.Path(reference).stem if reference.endswith(".py") else reference


def _for_all(one: Subject, seeds: tuple[int, ...]) -> Subject:
    before = [{**one.before[0], "seed": seed} for seed in seeds]
    return dataclasses.replace(one, stages=one.stages * len(seeds), before=before)


def weights(bench: pipeline.Bench, folder: pathlib.Path) -> Any:
    """Parameters from a Hugging Face folder or from a stage of a work directory.

    Raises:
      UserError: if there are none, or they are of another shape than the model.
    """
    shapes = jax.eval_shape(bench.model.init, jax.random.key(0))
    if _is_stage(folder):
        if bench.placement:
            shapes = bench.placement.shapes(shapes)
        return checkpoint.load_params(folder / "release", shapes)
    model, params = huggingface.load(str(folder))
    if jax.tree.map(jax.numpy.shape, params) != jax.tree.map(
        lambda leaf: leaf.shape, shapes
    ):
        raise errors.UserError(
            f"--checkpoint={folder}: a model of {model.config}, but the world's is of "
            f"{bench.model.config}. Give the data of the checkpoint with --harmful and "
            "--benign, or the sandbox's size with --preset."
        )
    return params


def _is_stage(folder: str | pathlib.Path) -> bool:
    return (pathlib.Path(folder) / "release").is_dir()


def companies(seeds: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Seeds whose releases are trained together; at `quick` there is one release."""
    if FLAGS.budget == "quick" or FLAGS.checkpoint:
        return [seeds[:1]]
    return [seeds] if FLAGS.vmap_seeds else [(seed,) for seed in seeds]


def reference_names() -> tuple[str, ...]:
    """The undefended model, and one that never knew."""
    if _is_own_release():
        return ("none",) if FLAGS.reference else ()
    known = ("none",) if has_own_data() else REFERENCES  # Nobody's model never knew.
    return tuple(name for name in known if name != FLAGS.defense)


def reference(
    name: str, bench: pipeline.Bench, runner: cells.Cells, seeds: tuple[int, ...]
) -> Subject:
    """A reference, trained at the first seed."""
    (chosen,) = choices.chosen(bench, "defenses", [name])
    return _trained(chosen, runner, seeds[:1])


def templates() -> list[str]:
    """Templates of the defense: asked for, or from its card."""
    if in_service():  # Whose weights no template's attack reaches.
        return []
    if FLAGS.template or not FLAGS.defense:
        return FLAGS.template
    module = registry.load("defenses", _name())
    found = re.findall(r"T[1-4]", cards.card(module).get("Template", ""))
    # A weight edit after training is undone by one.
    return [*found, attack_templates.POST_HOC] if hasattr(module, "edit") else found


# Of audit.py and run.py, by which both see the same model and data.
_SHARED = (
    "model",
    "model_stage",
    "pretrained",
    "preset",
    "world_seed",
    "harmful",
    "benign",
    "refusals",
    "task",
)
_SHARED += ("heldout_harmful", "heldout_benign", "length", "max_new_tokens", "truncate")
_SHARED += ("chat_template", "collapse_word", "compute_dtype", "matmul_precision")
_SHARED += ("mesh", "remat", "eval_batch_size")


def repeated(seed: int) -> tuple[str, ...]:
    """Flags of run.py that make what is audited, at one seed."""
    shared = [FLAGS[name].serialize() for name in _SHARED if FLAGS[name].present]
    if FLAGS.defense:
        release = [f"--defense={FLAGS.defense}"]
    else:
        # A stage's weights have to be written by export.py first.
        weights = "EXPORTED" if _is_stage(FLAGS.checkpoint) else FLAGS.checkpoint
        release = [f"--model={weights}", "--model_stage=aligned", "--defense=none"]
    overrides = [f"--set={one}" for one in FLAGS.set]
    return (*release, *shared, f"--seeds={seed}", *overrides)


def serve(plan: plans.Plan | None) -> Callable[[Any, int], Any] | None:
    """How the audited defense, trained by `plan`, deploys weights, if it adds to them."""
    if not FLAGS.defense or plan is None:
        return None
    module = registry.load("defenses", _name())
    if not hasattr(module, "serve"):
        return None
    return lambda params, seed: module.serve(params, plan.hp, seed)
