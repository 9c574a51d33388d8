"""Errors that a user can mend: one line that says what, where, and what to do."""

from collections.abc import Iterable
import difflib


class UserError(Exception):
    """Bad input. Scripts print it as one line and exit with status 2."""


class NonFiniteError(UserError):
    """A loss or norm is NaN or infinite; training stopped before it was saved."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error that names the near matches of `name`, or else all that is known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    remedy = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"known: {', '.join(known)}."
    )
    return UserError(f"unknown {kind} {name!r}; {remedy}")
