"""One run, from where it begins or goes on to its summary."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from autowu.training.build import Parts
from autowu.training.checkpoints import Checkpoints
from autowu.training.config import TrainConfig
from autowu.training.console import Console, NullConsole
from autowu.training.data import Loaders
from autowu.training.folder import RunFolder
from autowu.training.loop import Loop
from autowu.training.process import Process
from autowu.training.progress import Progress
from autowu.training.records import NullRecorder, Recorder, summarize
from autowu.training.signals import StopSignals

__all__ = ["train_run"]


def train_run(
    config: TrainConfig,
    process: Process,
    parts: Parts,
    loaders: Loaders,
    folder: RunFolder,
    started: float,
    *,
    trunk: RunFolder | None = None,
    branches: Mapping[float, int] | None = None,
) -> dict[str, Any]:
    """Train `parts` to the end and write `folder`; the summary. Raises Stopped, after a checkpoint, if a signal asks for it.

    Args:
        config: of this run.
        process: this process among those of the run.
        parts: what is trained, as `config` says.
        loaders: of its images.
        folder: of the run; with ``config.resume`` it goes on from the checkpoint there, where there is one.
        started: time of the start by `time.perf_counter`.
        trunk: folder of the run that this one branches off.
        branches: the first step of each branch, by its cooldown_fraction.
    """
    steps_per_epoch = len(loaders.train)
    checkpoints = Checkpoints(parts, process, folder, config, branches)
    progress = _begin(config, checkpoints, trunk)
    recorder, console = NullRecorder(), NullConsole()
    if process.is_main:
        recorder = Recorder(folder, progress, steps_per_epoch, config.log_layers, trunk, config.log_tensorboard, config)
        console = Console(config, process, parts.model, steps_per_epoch, progress.steps(steps_per_epoch))
    with recorder:
        with console, StopSignals(process, config.cooldown_on_interrupt is not None) as signals:
            progress = Loop(config, process, parts, loaders, checkpoints, recorder, console, signals).train(progress)
        wall_s = time.perf_counter() - started
        summary = summarize(config, process, parts, steps_per_epoch, progress, wall_s)
        recorder.finish(summary, parts.autowu)
        console.finish(summary, folder.path)
    return summary


def _begin(config: TrainConfig, checkpoints: Checkpoints, trunk: RunFolder | None) -> Progress:
    """Set the parts to what the run begins with; where it stands then."""
    if config.resume:
        return checkpoints.load_newest()
    if trunk is None:
        return Progress()
    assert isinstance(config.cooldown_fraction, float)
    return checkpoints.load(trunk.branch_path(config.cooldown_fraction))
