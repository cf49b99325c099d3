"""Files that are renewed whole or not at all."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["link", "read_rows", "remove", "replacing", "save", "sync_folder"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to replace `path`: beside it. It is moved there at the end, in one move; not after an error.

    Example:
        >>> path = Path(getfixture("tmp_path"), "numbers.txt")
        >>> with replacing(path) as partial:
        ...     partial.write_text("1 2 3")
        5
        >>> path.read_text(), list(path.parent.iterdir()) == [path]
        ('1 2 3', True)
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a machine that goes down could keep the move and lose the content
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def link(path: Path, name: Path) -> None:
    """Give the file the second name `name`, in one move; a copy of it where the file system has no links."""
    with replacing(name) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a file of torch.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's own, after that of a file that cannot be written
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """See that the names in it outlive a machine that goes down, where the system can."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with these columns, or the first of them: the others are blank. What a cut left incomplete is no row.

    Raises:
        OSError: if the file cannot be read.
    """
    whole, _, _ = path.read_bytes().decode(errors="replace").rpartition("\n")
    reader = csv.DictReader(whole.splitlines())
    known = list(reader.fieldnames or [])
    if not known or known != list(fields)[: len(known)]:
        return []
    return [dict.fromkeys(fields, "") | row for row in reader if list(row) == known and None not in row.values()]
