"""The two errors that train.py says in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["RunError", "UsageError", "unknown_name"]


class UsageError(Exception):
    """Something the user asked for cannot be: said in one line, with exit code 2, before anything was trained."""

    code = 2


class RunError(Exception):
    """A run cannot go on for what the machine or the data did: said in one line, with exit code 1."""

    code = 1

    def __init__(self, message: str) -> None:
        # A loader process hands on its traceback, of which this error's own line is the last.
        super().__init__(message.rsplit("RunError: ", 1)[-1].strip())


def unknown_name(option: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of `known`, with the nearest ones suggested."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"{option} {name}: not known{hint}")
