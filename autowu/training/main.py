"""The program behind train.py, from the top."""

from __future__ import annotations

import errno
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autowu.training.board import check_board
from autowu.training.build import allow_tf32, build
from autowu.training.config import RunError, TrainConfig, UsageError, parse_args
from autowu.training.cooldowns import train_cooldowns
from autowu.training.data import find_data
from autowu.training.folder import RunFolder
from autowu.training.plan import without_training
from autowu.training.process import Process, join
from autowu.training.run import train_run
from autowu.training.signals import Stopped
from autowu.training.trackers import check_trackers

__all__ = ["main", "told_as_run_errors", "train"]

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py; the exit code.

    0 at the end and after SIGTERM or SIGUSR1, with a checkpoint; 1 for what broke off, 2 for what the user asked and cannot be, 130
    after Ctrl-C.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    code, interrupted = 0, False
    try:
        config = parse_args(argv)
    except UsageError as error:
        if is_main:  # all processes have the same command line
            print(f"train.py: error: {error}", file=sys.stderr)
        return error.code
    try:
        with join(config.device, group=config.fsdp) as process:
            try:
                train(config, process)
            except Stopped as stopped:  # the processes stop, and leave, together
                interrupted = True
                code = 128 + stopped.number if stopped.number == signal.SIGINT else 0
    except (UsageError, RunError) as error:
        return error.code
    except KeyboardInterrupt:
        interrupted, code = True, 128 + signal.SIGINT
    if is_main and interrupted and (config.run_dir / "config.json").exists():
        print(f"interrupted; go on with the same options and --run-dir {config.run_dir} --resume", file=sys.stderr)
    return code


def train(config: TrainConfig, process: Process) -> dict[str, Any]:
    """Train as `config` says and write the run folder; the summary, on every process.

    With several values of `cooldown_fraction` the summary is that of the smallest. With ``--eval`` the result is that of the test,
    and with ``--dry-run`` it is empty; nothing is written.

    Raises:
        UsageError: if something in `config` cannot be, before anything was trained.
        RunError: if the disk is full, an image cannot be read, or a loader process has died.
        Stopped: if a signal asks for it.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    if config.sync_bn and process.device.type != "cuda" and config.recipe is None:  # a recipe's is left out there
        raise UsageError("--sync-bn: works on GPUs only")
    # Each may have named a folder after its own clock, or have split a step by an older state of a shared folder.
    run_dir, size, accum = process.gather((config.run_dir, config.batch_size, config.grad_accum))[0]
    config = replace(config, run_dir=run_dir, batch_size=size, grad_accum=accum)
    check_board(config)
    check_trackers(config)
    allow_tf32(config.tf32, process.device)
    data = find_data(config, process)
    if config.eval is not None:
        return without_training(config, process, data)
    folder = RunFolder(config, process.world_size)
    process.on_main(folder.check)
    if config.dry_run:
        return without_training(config, process, data)
    try:
        with told_as_run_errors(config):
            if isinstance(config.cooldown_fraction, list):
                summary = train_cooldowns(config, process, data, folder, started)
            else:
                parts, loaders = build(config, process, data)
                with closing(loaders):
                    process.on_main(folder.claim)
                    summary = train_run(config, process, parts, loaders, folder, started)
    finally:
        folder.release()
    return summary


@contextmanager
def told_as_run_errors(config: TrainConfig) -> Iterator[None]:
    """Raise a RunError in the place of what a full disk, a run folder that is gone, or a loader process that dies, raises."""
    try:
        yield
    except OSError as error:
        in_folder = error.filename is not None and Path(str(error.filename)).is_relative_to(config.run_dir)
        if error.errno not in _DISK and not in_folder:
            raise
        raise RunError(f"{error.filename or config.run_dir}: cannot be written: {error.strerror}") from None
    except RuntimeError as error:  # torch has no class of its own for it
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = textwrap.shorten(str(error), 160)
        raise RunError(
            f"a loader process has died; go on with --resume, for want of memory with fewer --workers ({reason})"
        ) from None
