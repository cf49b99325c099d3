"""What --log-tensorboard writes: the rows of metrics.csv and epochs.csv, as curves that TensorBoard draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autowu.training.config import TrainConfig, UsageError
from autowu.training.progress import StepRow

__all__ = ["PHASES", "Board", "check_board", "curves"]

PHASES = ("", "warmup", "stable", "cooldown", "done")
"""The curve of the phase has the place of its name here."""


def check_board(config: TrainConfig) -> None:
    """See that TensorBoard is there, where it is asked for.

    Raises:
        UsageError: if it is not installed.
    """
    if config.log_tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--log-tensorboard: needs tensorboard: pip install tensorboard")


def curves(steps: Sequence[StepRow], row: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """The values of an epoch by their names, with the number of each step; those of the epoch itself with its last."""
    for of_step in steps:
        values = {"train/loss": of_step.loss, "train/lr": of_step.lr, "train/phase": float(PHASES.index(of_step.phase))}
        if of_step.probability is not None:
            values["train/probability"] = of_step.probability
        if of_step.step == row["step"]:
            values |= {f"epoch/{name}": row[name] for name in ("test_loss", "test_accuracy", "train_loss", "images_per_s")}
        yield of_step.step, values


class Board:
    """Writes event files, an epoch at a time.

    Args:
        path: their folder.
        step: steps that are done; what a run that was cut off has written of later ones is purged.
    """

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=step)

    def epoch(self, steps: Sequence[StepRow], row: Mapping[str, Any]) -> None:
        """Add an epoch: its rows of metrics.csv, and its row of epochs.csv."""
        for step, values in curves(steps, row):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        for of_step in steps:
            if of_step.event:
                self._writer.add_text("events", of_step.event, of_step.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
