"""The program behind train.py, from the top."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from autowu.training.build import build
from autowu.training.config import TrainConfig, UsageError, parse_args
from autowu.training.cooldowns import train_cooldowns
from autowu.training.data import find_data
from autowu.training.folder import RunFolder
from autowu.training.process import Process, join
from autowu.training.run import train_run

__all__ = ["main", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py; the exit code: 0, 2 for what the user asked and cannot be, 130 after Ctrl-C."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_args(argv)
        with join(config.device) as process:
            train(config, process)
    except UsageError as error:
        if is_main:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main and (config.run_dir / "checkpoint.pt").exists():
            print(f"interrupted; go on with the same options and --run-dir {config.run_dir} --resume", file=sys.stderr)
        return 130
    return 0


def train(config: TrainConfig, process: Process) -> dict[str, Any]:
    """Train as `config` says and write the run folder; the summary, on every process.

    With several values of `cooldown_fraction` the summary is that of the smallest.

    Raises:
        UsageError: if something in `config` cannot be, before anything was trained.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    if config.sync_bn and process.device.type != "cuda":
        raise UsageError("--sync-bn: works on GPUs only")
    data = find_data(config, process)
    folder = RunFolder(config, process.world_size)
    if config.resume:
        folder.check_resumable()
    elif process.is_main:
        folder.check_empty()  # for the others it may already have begun
    if isinstance(config.cooldown_fraction, list):
        return train_cooldowns(config, process, data, folder, started)
    parts, loaders = build(config, process, data)
    return train_run(config, process, parts, loaders, folder, started)
