"""What a run writes down: a row a step and an epoch, the layers, and at the end summary and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch.optim import Optimizer

from autowu.scheduler import AutoWU
from autowu.training.board import Board
from autowu.training.build import Parts
from autowu.training.config import TrainConfig
from autowu.training.files import replacing
from autowu.training.folder import RunFolder
from autowu.training.layers import LayerLog
from autowu.training.process import Process
from autowu.training.progress import Progress, StepRow
from autowu.training.trackers import open_trackers

__all__ = ["NullRecorder", "Recorder", "epoch_row", "summarize"]


def epoch_row(
    steps: Sequence[StepRow], phase: str, test: tuple[float, float], seconds: float, images_per_s: float
) -> dict[str, Any]:
    """The row of epochs.csv of an epoch.

    Args:
        steps: its rows of metrics.csv. Losses that are not finite do not count in the mean.
        phase: of the last step.
        test: loss and accuracy after it.
        seconds: that training and test took.
        images_per_s: that were trained on, by all processes.
    """
    last = steps[-1]
    finite = [row.loss for row in steps if math.isfinite(row.loss)]
    return {
        "epoch": last.epoch,
        "step": last.step,
        "phase": phase,
        "lr": last.lr,
        "train_loss": sum(finite) / len(finite) if finite else math.nan,
        "test_loss": test[0],
        "test_accuracy": test[1],
        "seconds": round(seconds, 3),
        "images_per_s": round(images_per_s, 1),
    }


def summarize(
    config: TrainConfig, process: Process, parts: Parts, steps_per_epoch: int, progress: Progress, wall_s: float
) -> dict[str, Any]:
    """The content of summary.json: how the run that `progress` is at the end of went, and what it was. `wall_s` is in seconds."""
    switch = None if parts.autowu is None else parts.autowu.switch
    return {
        "test_accuracy": progress.last["test_accuracy"],
        "test_loss": progress.last["test_loss"],
        "train_loss": progress.last["train_loss"],
        "switch_step": None if switch is None else switch.step,
        "minimum_step": None if switch is None else switch.minimum,
        "switch_by_test": None if switch is None else switch.by_test,
        "peak_lr": switch.lr if switch else max(float(lr) for lr in parts.scheduler.base_lrs),
        "total_steps": parts.scheduler.last_epoch if config.ends_early else config.epochs * steps_per_epoch,
        "wall_s": round(wall_s, 2),
        "train_s": round(progress.elapsed, 2),
        "model": config.model,
        "opt": config.opt,
        "sched": config.sched,
        "batch_size": config.step_size * process.world_size,
        "world_size": process.world_size,
    }


class NullRecorder:
    """Writes nothing: what the processes beside the main one have."""

    def __enter__(self) -> None:
        """Before the first step."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After all, or when the run breaks off."""

    def step(self, step: int, optimizer: Optimizer) -> None:
        """`optimizer` has taken this step, numbered from 0, and still has its LRs."""

    def epoch(self, steps: Sequence[StepRow], row: Mapping[str, Any]) -> None:
        """An epoch is done: its rows of metrics.csv and its row of epochs.csv. A checkpoint follows."""

    def pause(self) -> None:
        """A checkpoint within an epoch follows, with its rows of metrics.csv. The run may stop there."""

    def finish(self, summary: Mapping[str, Any], scheduler: AutoWU | None) -> None:
        """The run is done."""


class Recorder(NullRecorder):
    """Writes the records of a run into its folder.

    Args:
        folder: of the run.
        progress: where the run goes on; what the folder holds of later steps is dropped.
        steps_per_epoch: optimizer steps.
        log_layers: steps from one logged step to the next; None for no log of the layers.
        log_tensorboard: whether TensorBoard has the metrics too.
        trunk: folder of the run that this one branches off and whose records it takes over.
        tracked: what trackers of experiments are told of the run, where any are asked for.

    Raises:
        UsageError: if the folder cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        steps_per_epoch: int,
        log_layers: int | None,
        trunk: RunFolder | None = None,
        log_tensorboard: bool = False,
        tracked: TrainConfig | None = None,
    ) -> None:
        self._folder = folder
        self._log_layers = log_layers
        folder.start(progress.epochs * steps_per_epoch, trunk)
        self._board = Board(folder.path / "tensorboard", progress.epochs * steps_per_epoch) if log_tensorboard else None
        self._trackers = [] if tracked is None else open_trackers(tracked, folder.path)
        self._layers: LayerLog | None = None
        if log_layers is not None:
            done = progress.steps(steps_per_epoch)
            self._layers = LayerLog(folder.path, done, None if trunk is None else trunk.path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for log in (self._layers, self._board, *self._trackers):
            if log is not None:
                log.close()

    def step(self, step: int, optimizer: Optimizer) -> None:
        if self._layers is not None and self._log_layers is not None and step % self._log_layers == 0:
            self._layers.add(step, optimizer)

    def epoch(self, steps: Sequence[StepRow], row: Mapping[str, Any]) -> None:
        self._folder.add_steps(steps)
        self._folder.add_epoch(row)
        for log in (self._board, *self._trackers):
            if log is not None:
                log.epoch(steps, row)
        if self._layers is not None:
            self._layers.save()

    def pause(self) -> None:
        if self._layers is not None:
            self._layers.save()

    def finish(self, summary: Mapping[str, Any], scheduler: AutoWU | None) -> None:
        from autowu.plotting import draw_run

        if self._layers is not None:
            self._layers.finish()  # before the summary, by which a branch counts as done
        self._folder.write_summary(summary)
        rows = self._folder.rows("metrics.csv")
        figure = draw_run([float(row["loss"]) for row in rows], [float(row["lr"]) for row in rows], scheduler)
        with replacing(self._folder.path / "figure.png") as partial:
            figure.savefig(partial, dpi=150, format="png")
