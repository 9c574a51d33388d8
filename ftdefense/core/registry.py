"""Methods are found by their file names: no decorator, no enum, no list to edit."""

import functools
import importlib
import importlib.util
import pathlib
import pkgutil
import types as python_types

from ftdefense.core import errors
from ftdefense.core import types


def names(package: str) -> list[str]:
    """Public modules of `ftdefense.<package>`, sorted."""
    module = importlib.import_module(f"ftdefense.{package}")
    return sorted(
        info.name
        for info in pkgutil.iter_modules(module.__path__)
        if not info.name.startswith("_")
    )


@functools.cache
def load(package: str, name: str) -> python_types.ModuleType:
    """The module of one method: `name` is a file of the package or a path to a .py file.

    Raises:
      UserError: naming near matches, if there is no such method.
    """
    if name.endswith(".py"):
        return _load_file(package, pathlib.Path(name))
    if name not in names(package):
        raise errors.unknown(package.removesuffix("s"), name, names(package))
    return importlib.import_module(f"ftdefense.{package}.{name}")


def _load_file(package: str, path: pathlib.Path) -> python_types.ModuleType:
    if not path.is_file():
        raise errors.UserError(f"{package.removesuffix('s')} file not found: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [part for part in ("Hparams", "method") if not hasattr(module, part)]
    if missing:
        raise errors.UserError(
            f"{path}: defines no {' and no '.join(missing)}; see README, 'Add a defense'."
        )
    return module


@functools.cache
def method(package: str, name: str, model: types.Model) -> types.Method:
    """One `Method` per (name, model), so that `jit` sees the same functions again."""
    return load(package, name).method(model)
