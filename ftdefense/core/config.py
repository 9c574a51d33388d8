"""Overrides, (de)serialisation and hashing of configurations.

A configuration is a tree of dataclasses (`flax.struct` or plain) whose leaves are
numbers, strings, booleans, None or tuples of these.
"""

import ast
from collections.abc import Iterable
import dataclasses
import hashlib
import json
import typing
from typing import Any

import jax
import numpy as np

from ftdefense.core import errors


def override(config: Any, assignments: Iterable[str]) -> Any:
    """Applies `path.to.field=value` strings to a tree of dataclasses.

    A field that holds one of several dataclasses (its class has a `choices` static
    method: {name: instance}) may be assigned a name, as `adapter=lora`.

    Raises:
      UserError: for an unknown field (near matches are named) or a wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise errors.UserError(
                f"--set {assignment!r}: expected path.to.field=value, "
                "as defense.alpha=0.2"
            )
        config = _replace(config, path.strip().split("."), text.strip(), assignment)
    return config


def has_field(plan: Any, assignment: str) -> bool:
    """Whether a plan or its `hp` has the first field of `field...=value`."""
    name = assignment.partition("=")[0].partition(".")[0].strip()
    return name in _fields_of_plan(plan) or name in _fields(plan.hp)


def override_plan(plan: Any, assignment: str) -> Any:
    """Applies one assignment to a plan or, where it has no such field, to its `hp`."""
    name = assignment.partition("=")[0].partition(".")[0].strip()
    if name in _fields_of_plan(plan):
        return override(plan, [assignment])
    if name not in _fields(plan.hp):
        known = _fields_of_plan(plan) | _fields(plan.hp)
        error = errors.unknown("field", name, known)
        raise errors.UserError(f"--set {assignment}: {error}")
    return dataclasses.replace(plan, hp=override(plan.hp, [assignment]))


def differences(base: Any, other: Any, path: str = "") -> list[str]:
    """`path.to.field=value` strings that `override` turns `base` into `other` by.

    What no string can say is left out: compare what they make with `other`.
    """
    found = []
    for name in (field.name for field in dataclasses.fields(base)):
        mine, wanted = getattr(base, name), getattr(other, name)
        there = f"{path}{name}"
        if type(mine) is not type(wanted) and hasattr(mine, "choices"):
            kinds = {type(one): (n, one) for n, one in mine.choices().items()}
            if type(wanted) in kinds:
                chosen, mine = kinds[type(wanted)]
                found.append(f"{there}={chosen}")
        if dataclasses.is_dataclass(mine) and type(mine) is type(wanted):
            found += differences(mine, wanted, f"{there}.")
        elif to_dict(mine) != to_dict(wanted):
            found.append(f"{there}={'none' if wanted is None else wanted}")
    return found


def plan_differences(base: Any, plan: Any) -> list[str]:
    """As `differences`, for `override_plan`; what a source says is no difference."""
    rest = dataclasses.replace(plan, hp=base.hp, source=base.source)
    return [*differences(base, rest), *differences(base.hp, plan.hp)]


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _fields_of_plan(plan: Any) -> set[str]:
    return _fields(plan) - {"hp", "source"}


def _replace(config: Any, path: list[str], text: str, assignment: str) -> Any:
    known = [field.name for field in dataclasses.fields(config)]
    name, *rest = path
    if name not in known:
        error = errors.unknown("field", name, known)
        raise errors.UserError(f"--set {assignment}: {error}")
    current = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(current):
            raise errors.UserError(f"--set {assignment}: {name!r} has no fields.")
        return dataclasses.replace(
            config, **{name: _replace(current, rest, text, assignment)}
        )
    value = _parse(config, name, current, text, assignment)
    return dataclasses.replace(config, **{name: value})


def _parse(config: Any, name: str, current: Any, text: str, assignment: str) -> Any:
    if hasattr(current, "choices"):
        choices = current.choices()
        if text not in choices:
            error = errors.unknown(name, text, choices)
            raise errors.UserError(f"--set {assignment}: {error}")
        return choices[text]
    if dataclasses.is_dataclass(current):
        fields = ", ".join(f"{name}.{f.name}" for f in dataclasses.fields(current))
        raise errors.UserError(f"--set {assignment}: set one of {fields}.")
    expected = _expected_types(config, name, current)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if float in expected and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if float in expected and isinstance(value, str):
        value = {"inf": float("inf")}.get(value, value)
    if type(value) not in expected:
        wanted = " or ".join(sorted(map(_worded, expected)))
        raise errors.UserError(
            f"--set {assignment}: {name} is {wanted}, "
            f"but {text!r} is {_worded(type(value))}."
        )
    return value


def _worded(kind: type) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
    }
    return words.get(kind, f"a {kind.__name__}")


def _expected_types(config: Any, name: str, current: Any) -> set[type]:
    """The declared types of a field; the type of its value where none is declared."""
    hint = typing.get_type_hints(type(config)).get(name, type(current))
    options = typing.get_args(hint) or (hint,)
    origin = typing.get_origin(hint)
    if origin in (tuple, list):
        return {origin}
    found = {
        typing.get_origin(option) or option
        for option in options
        if isinstance(option, type) or typing.get_origin(option)
    }
    return found or {type(current)}


def to_dict(config: Any) -> Any:
    """Plain containers for JSON; a dataclass keeps its class name under `kind`."""
    if dataclasses.is_dataclass(config):
        fields = {
            field.name: to_dict(getattr(config, field.name))
            for field in dataclasses.fields(config)
        }
        return {"kind": type(config).__name__, **fields}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if isinstance(config, (jax.Array, np.ndarray, np.generic)):
        return np.asarray(config).tolist()
    return config


def dumps(config: Any) -> str:
    """Canonical JSON: sorted keys, so equal configurations give equal text."""
    return json.dumps(to_dict(config), sort_keys=True, indent=1)


def digest(*parts: Any) -> str:
    """Twelve hex digits that change when anything in `parts` does."""
    text = "\n".join(dumps(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
