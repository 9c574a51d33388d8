"""Processes that share one command's work, each on cores of its own.

On models of the sandbox's size XLA's threads wait for each other, and tracing has one:
two processes on a core each get more done than one on both (bench.py has the ratio of
steps alone). A worker is the same command with --worker=i/n/parent: it fills the work
directory, unit by unit, with what the command then reads.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from absl import flags
import jax
import settings
import tqdm

from ftdefense.core import config
from ftdefense.core import errors
from ftdefense.training import checkpoint
from ftdefense.training import progress

FLAGS = flags.FLAGS
flags.DEFINE_integer(
    "jobs",
    None,
    "Processes that share the work, each on its part of the cores. Default: one a core "
    "for the sandbox on a CPU, else one in all.",
    lower_bound=1,
)
flags.DEFINE_string("worker", "", "Set by --jobs for its processes: i/n/parent.")

Units = list[tuple[str, Callable[[], Any]]]  # Name, and what is to be done.


def count(units: int) -> int:
    """How many processes to start for so many independent units of work."""
    if FLAGS.jobs is not None:
        return min(FLAGS.jobs, units)
    small = FLAGS.model is None and not FLAGS.mesh
    if not small or jax.default_backend() != "cpu":
        return 1
    return min(len(_cores()), units)


def split(
    units: Units,
    finished: pathlib.Path,
    first: Callable[[], Any] = lambda: None,
    then: Callable[[], Units] | None = None,
) -> dict[str, float] | None:
    """Has workers do the units, where several would help; a worker does its part.

    Args:
      finished: a file; where it is, there is nothing to do but to read.
      first: what all units begin with; it is done on all cores, while workers start.
      then: more units, which need all of the first.

    Returns:
      The seconds that each unit took a worker; None to a worker, which is then done.
    """
    if _enlisted():
        _share(units, then)
        return None
    number = count(len(units))
    if number == 1 or finished.is_file():
        return {}
    return _fill(number, len(units), first)


def _fill(number: int, units: int, first: Callable[[], Any]) -> dict[str, float]:
    """Has `number` workers do the units that they claim, to be read by whoever asks next.

    Returns:
      The seconds that each unit took.

    Raises:
      UserError: what a worker raised, or that one died of something else.
    """
    claims = _claims()
    shutil.rmtree(claims, ignore_errors=True)  # Of one that had this number, and died.
    claims.mkdir(parents=True)
    alive = (claims / "parent").open("w")
    fcntl.flock(alive, fcntl.LOCK_EX)
    _sweep(claims.parent)
    running = [_worker(i, number) for i in range(number)]
    try:
        first()
        with tqdm.tqdm(
            total=units,
            desc="shared among processes",
            disable=not sys.stderr.isatty(),
            position=number,
            mininterval=1.0,
            leave=False,
        ) as bar:
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running):
                    break  # Others may wait for what this one was to do.
                done = len(list(claims.glob("*.done")))
                bar.total = max(units, done)
                bar.update(done - bar.n)
                time.sleep(0.1)
        failed = sum(bool(process.poll()) for process in running)
    finally:
        for process in running:
            process.terminate()
            process.wait()
            process.stdin.close()
    alive.close()
    said = [path.read_text() for path in claims.glob("*.error")]
    done = [json.loads(path.read_text()) for path in claims.glob("*.done")]
    shutil.rmtree(claims)
    with contextlib.suppress(OSError):  # Another command's may be there.
        claims.parent.rmdir()
    if failed:
        said = said or [f"{failed} of {number} processes failed: see above."]
        raise errors.UserError(
            f"{said[0]} What else is finished is kept; the same command goes on from there."
        )
    return {one["unit"]: one["seconds"] for one in done}


def _worker(i: int, number: int) -> subprocess.Popen:
    # Flags given twice: the last one counts.
    command = [sys.executable, *sys.argv, f"--worker={i}/{number}/{os.getpid()}"]
    return start(command, i, number, stdin=subprocess.PIPE)


def start(command: list[str], i: int, number: int, **options: Any) -> subprocess.Popen:
    """A process on the i-th of `number` parts of the cores; options of Popen."""
    part = _part(_cores(), i, number)
    # XLA reads NPROC: for systems on which no process can be bound to cores.
    environment = {**os.environ, "NPROC": str(len(part))}
    with _pinned(part):
        return subprocess.Popen(command, env=environment, **options)


def _cores() -> list[int]:
    """Numbers of the cores that this process may use; where that is unknown, all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _part(cores: list[int], i: int, number: int) -> list[int]:
    """The i-th of `number` parts; with fewer cores than parts, some share one."""
    if number > len(cores):
        return [cores[i % len(cores)]]
    return cores[i * len(cores) // number : (i + 1) * len(cores) // number]


@contextlib.contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """What this thread starts inherits the cores that it may use itself."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _enlisted() -> bool:
    """Whether this process is a worker; it then ends when the one that started it does."""
    if not FLAGS.worker:
        return False
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Its parent tells it to end.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    progress.place(int(FLAGS.worker.partition("/")[0]))
    return True


def _leave_with_parent() -> None:
    """The pipe ends when whoever holds it dies, of whatever; files are whole always."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _share(units: Units, then: Callable[[], Units] | None = None) -> None:
    """What a worker does: those units, in this order, that no other has claimed.

    Args:
      then: more units, which need all of the first: they wait until all are done.
    """
    for name, do in units:
        with _claim(name) as mine:
            if mine:
                _guarded(do)
    if then is not None:
        while not all(_done(name).exists() for name, _ in units):
            time.sleep(0.1)
        _share(then())


def _guarded(do: Callable[[], Any]) -> None:
    """Leaves a user's error to the parent, lest it be printed twice."""
    try:
        do()
    except errors.UserError as error:
        (_claims() / f"{os.getpid()}.error").write_text(str(error))
        sys.exit(2)


@contextlib.contextmanager
def _claim(unit: str) -> Iterator[bool]:
    """Whether a unit is this worker's: the first to ask has it, for as long as it lives."""
    done = _done(unit)
    file = done.with_suffix(".claim").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        yield False
        return
    _HELD.append(file)
    if done.exists():  # By one that has left.
        yield False
        return
    started = time.monotonic()
    yield True
    seconds = time.monotonic() - started
    checkpoint.write_json(done, {"unit": unit, "seconds": seconds})


def _done(unit: str) -> pathlib.Path:
    return _claims() / f"{config.digest(unit)}.done"


_HELD = []  # Open files: a lock ends with its process, whichever way.


def _claims() -> pathlib.Path:
    """A folder for each command: two may share a work directory, whose stages lock."""
    parent = FLAGS.worker.rpartition("/")[2] or os.getpid()
    return settings.workdir() / "claims" / str(parent)


def _sweep(folder: pathlib.Path) -> None:
    """Removes the claims of commands that were killed, whose lock went with them."""
    for claims in folder.iterdir():
        with contextlib.suppress(OSError), (claims / "parent").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(claims, ignore_errors=True)
