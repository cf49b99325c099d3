"""How a step is split over processes and batches, also where a run goes on under another number of processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from autowu.training.errors import UsageError
from autowu.training.options import option_of

__all__ = ["SPLIT", "processes_of_run", "split_batch"]

SPLIT = ("world_size", "batch_size", "grad_accum", "global_batch_size")
"""The fields that may be others where the number of processes is another, as long as a step takes as many images."""


def processes_of_run() -> int:
    """How many processes a launcher has started, by the environment's WORLD_SIZE; 1 without one.

    Raises:
        UsageError: if it is no such number.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"WORLD_SIZE={given}: must be the number of processes, as a launcher sets it; unset it for one process")
    return int(given)


def split_batch(args: dict[str, Any], processes: int) -> None:
    """Derive what is open of `batch_size`, `grad_accum` and `global_batch_size`.

    A run that goes on takes as many images a step as before, whatever the number of processes is now.

    Raises:
        UsageError: if a step cannot be split so.
    """
    whole, size, accum = (args[name] for name in ("global_batch_size", "batch_size", "grad_accum"))
    if whole is not None:
        taken = processes * (accum or 1) * (size or 1)
        among = f"{processes} processes" + "".join(
            f" x {option_of(name)} {args[name]}" for name in ("grad_accum", "batch_size") if args[name] is not None
        )
        if whole % taken:
            raise UsageError(f"--global-batch-size {whole}: cannot be split over {among}; it must be a multiple of {taken}")
        if size is not None and accum is not None and whole != taken:
            raise UsageError(f"--global-batch-size {whole}: is not {among}, which is {taken}; leave one of the three out")
        size, accum = size or whole // taken, accum or (1 if size is None else whole // taken)
    elif args["resume"] and (before := _started_with(args["run_dir"])) and before["world_size"] != processes:
        size, accum = _split_again(before, size or 64, processes)
    args["batch_size"], args["grad_accum"] = size or 64, accum or 1


def _started_with(folder: Path) -> dict[str, int] | None:
    """How the steps of the run in `folder` were split; None where that cannot be read, which is told when the run is looked for."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        split = {name: int(saved.get(name, 1)) for name in SPLIT[:3]}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        return None
    return split if min(split.values()) >= 1 else None


def _split_again(before: dict[str, int], most: int, processes: int) -> tuple[int, int]:
    """Images a batch, at most `most`, and as few batches a step as give the step of `before` on as many `processes`."""
    whole = before["world_size"] * before["batch_size"] * before["grad_accum"]
    share, rest = divmod(whole, processes)
    if rest:
        raise UsageError(f"--resume: a step of the run takes {whole} images, which {processes} processes cannot share evenly")
    size = next(number for number in range(min(most, share), 0, -1) if share % number == 0)
    return size, share // size
