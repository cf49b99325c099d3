"""What a run writes: configuration, metrics, checkpoint, summary and figure, in one folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autowu.training.config import TrainConfig, UsageError

__all__ = ["RunFolder"]

_STEP_FIELDS = ("step", "epoch", "lr", "loss")
_EPOCH_FIELDS = ("epoch", "step", "phase", "lr", "train_loss", "test_loss", "test_accuracy", "seconds")


class RunFolder:
    """The folder of one run.

    ``config.json``, ``metrics.csv`` (a row an optimizer step), ``epochs.csv`` (a row an epoch), ``checkpoint.pt`` (renewed after
    every epoch), and at the end ``summary.json`` and ``figure.png``.

    Raises:
        UsageError: if the folder cannot be written, holds something already, or is to be resumed and holds no checkpoint.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.run_dir
        self.checkpoint_path = self.path / "checkpoint.pt"
        if config.resume and not self.checkpoint_path.is_file():
            raise UsageError(f"--resume: no checkpoint in {self.path}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not config.resume and any(self.path.iterdir()):
                raise UsageError(f"--run-dir {self.path}: not empty; go on with it by --resume, or name another")
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise UsageError(f"--run-dir {self.path}: cannot be written: {error.strerror or error}") from None

    def start(self, config: TrainConfig, step: int) -> None:
        """Write the configuration; of a resumed run keep the metrics of the `step` steps that the checkpoint has behind it."""
        options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        self._write_json("config.json", options)
        for name, fields in (("metrics.csv", _STEP_FIELDS), ("epochs.csv", _EPOCH_FIELDS)):
            kept = [row for row in self.rows(name) if int(row["step"]) < step] if step else []
            with (self.path / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, fields)
                writer.writeheader()
                writer.writerows(kept)

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file of this run."""
        with (self.path / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def add_steps(self, rows: Sequence[Sequence[float]]) -> None:
        """Append rows of `step, epoch, lr, loss` to metrics.csv."""
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def add_epoch(self, row: Mapping[str, Any]) -> None:
        """Append a row to epochs.csv."""
        with (self.path / "epochs.csv").open("a", newline="") as file:
            csv.DictWriter(file, _EPOCH_FIELDS).writerow(row)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one move, so that a cut never leaves half of one."""
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(dict(state), partial)
        partial.replace(self.checkpoint_path)

    def load_checkpoint(self) -> dict[str, Any]:
        """The checkpoint, on the CPU."""
        state: dict[str, Any] = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        return state

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write_json("summary.json", summary)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n")
