"""What a run tells: printed lines, AutoWU's log among them, and a progress bar where there is a terminal."""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from autowu.training.config import TrainConfig
from autowu.training.process import Process

__all__ = ["Console", "NullConsole", "headline"]

_RATE_S = 1.0  # over which images/s are averaged
_PLAIN_S = 60.0  # from one line to the next, within an epoch, where there is no terminal


def headline(config: TrainConfig, process: Process, model: nn.Module, steps_per_epoch: int) -> str:
    """What is trained, on what, and for how long, in a line."""
    parameters = sum(p.numel() for p in model.parameters())
    data = config.data_dir if config.dataset == "folder" else config.dataset
    epochs = f"{config.epochs} epochs" if config.max_time is None else f"{config.max_time:g} minutes, in epochs"
    return (
        f"{config.model} ({parameters:,} parameters) on {data}, {config.opt} with {config.sched}: "
        f"{epochs} of {steps_per_epoch} steps of "
        f"{config.step_size * process.world_size} images on {process.world_size} x {process.device.type}"
    )


class NullConsole:
    """Says nothing: what the processes beside the main one have."""

    def __enter__(self) -> None:
        """Before the first step."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After the last step, or when the run breaks off."""

    def step(self, epoch: int, lr: float, phase: str, probability: float | None = None) -> None:
        """A step is done, in the epoch of this number from 0; `probability`, where known, is that of the minimum being past."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done, of which `row` of epochs.csv tells."""

    def finish(self, summary: Mapping[str, Any], path: Path) -> None:
        """The run is done, and its results are in the folder `path`."""


class Console(NullConsole):
    """Prints a line for the run, each epoch, each of AutoWU's log records and the result, above a progress bar.

    Args:
        config: of the run.
        process: this process among those of the run.
        model: that is trained.
        steps_per_epoch: optimizer steps.
        done: steps done where the run goes on.
    """

    def __init__(self, config: TrainConfig, process: Process, model: nn.Module, steps_per_epoch: int, done: int) -> None:
        self._of = f"/{config.epochs}" if config.max_time is None else ""
        self._total = config.epochs * steps_per_epoch if config.max_time is None else None
        self._done = done
        self._images = config.step_size * process.world_size
        self._begin = headline(config, process, model, steps_per_epoch)
        self._began = self._since = self._plain_at = time.monotonic()
        self._taken = self._taken_since = 0
        self._rate = ""
        self._said_lost = False
        self._bar: Any = None
        self._lines = _Lines(self)
        self._level = logging.NOTSET

    def __enter__(self) -> None:
        from tqdm import tqdm

        self.say(self._begin)
        self._began = self._since = self._plain_at = time.monotonic()
        self._bar = tqdm(total=self._total, initial=self._done, unit="step", disable=None, leave=False)
        logger = logging.getLogger("autowu")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self._lines)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        logger = logging.getLogger("autowu")
        logger.removeHandler(self._lines)
        logger.setLevel(self._level)
        self._bar.close()
        self._bar = None

    def say(self, line: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self._bar is not None and not self._bar.disable:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def step(self, epoch: int, lr: float, phase: str, probability: float | None = None) -> None:
        self._taken += 1
        now = time.monotonic()
        if now - self._since >= _RATE_S:
            rate = (self._taken - self._taken_since) * self._images / (now - self._since)
            self._rate, self._since, self._taken_since = f", {rate:,.0f} images/s", now, self._taken
        past = "" if probability is None else f", P(minimum past) {probability:.2f}"
        where = f"epoch {epoch + 1}, LR {lr:.3g} {phase}{past}{self._rate}"
        if not self._bar.disable:
            self._bar.set_postfix_str(where, refresh=False)
            self._bar.update()
        elif now - self._plain_at >= _PLAIN_S:
            self._plain_at = now
            done = self._done + self._taken
            if self._total is None:
                self.say(f"step {done}, {where}")
                return
            left = datetime.timedelta(seconds=round((self._total - done) * (now - self._began) / self._taken))
            self.say(f"step {done}/{self._total}, {where}, {left} left")

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.say(
            f"epoch {row['epoch']:3d}{self._of}  LR {row['lr']:9.3g} {row['phase']:8s}  train loss {row['train_loss']:7.4f}  "
            f"test loss {row['test_loss']:7.4f}  test accuracy {row['test_accuracy']:7.2%}"
        )
        if math.isnan(row["train_loss"]) and not self._said_lost:
            self._said_lost = True
            self.say(f"no loss of epoch {row['epoch']} was finite: the weights are lost; begin anew with a lower --lr or AutoWU")

    def finish(self, summary: Mapping[str, Any], path: Path) -> None:
        how = "" if summary["switch_step"] is None else f"  switch at step {summary['switch_step']}"
        if summary["switch_by_test"] is False:
            how += " (limit of the warm-up)"
        self.say(
            f"\ntest accuracy {summary['test_accuracy']:.2%}  test loss {summary['test_loss']:.4f}{how}  "
            f"peak LR {summary['peak_lr']:.4g}  {summary['total_steps']} steps in {summary['wall_s']:.1f} s\nresults in {path}"
        )


class _Lines(logging.Handler):
    """Prints log records among the other lines."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(record.getMessage())
