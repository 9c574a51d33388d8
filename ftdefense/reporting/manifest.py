"""What produced a result: versions, devices, data, template, command."""

from collections.abc import Mapping
from collections.abc import Sequence
import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
from typing import Any

_PACKAGES = (
    "ftdefense",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "datasets",
)


def build(
    argv: Sequence[str], devices: Sequence[str], hashes: Mapping[str, str], title: str
) -> dict[str, Any]:
    """Everything needed to say what was run, and to run it again.

    Args:
      devices: as jax names them.
      hashes: of every pool, evaluation set and the chat template.
    """
    return {
        "title": title,
        "command": shlex.join(["python", *argv]),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": list(devices),
        "data": dict(hashes),
        "commit": _commit(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the source tree, with + if it has changes; empty outside git."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:
        return ""
