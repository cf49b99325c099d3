"""The folder of a run: where each of its files is, and what is in them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autowu.training.config import TrainConfig, UsageError
from autowu.training.files import read_rows, replacing

__all__ = ["RunFolder"]

_FREE_TO_CHANGE = {"resume", "run_dir", "workers", "device"}

_STEP_FIELDS = ("step", "epoch", "lr", "loss")
_EPOCH_FIELDS = ("epoch", "step", "phase", "lr", "train_loss", "test_loss", "test_accuracy", "seconds")
_FIELDS = {"metrics.csv": _STEP_FIELDS, "epochs.csv": _EPOCH_FIELDS}


class RunFolder:
    """The folder of one run, or of a branch of one, which is a folder in that of its trunk. Nothing is made before :meth:`start`.

    ``config.json``, ``metrics.csv`` (a row an optimizer step), ``epochs.csv`` (a row an epoch), ``checkpoint.pt`` (renewed after
    every epoch), and at the end ``summary.json`` and ``figure.png``. :class:`~autowu.training.layers.LayerLog` writes there too.
    """

    def __init__(self, config: TrainConfig, world_size: int) -> None:
        self.path = config.run_dir
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()} | {"world_size": world_size}

    def branch_path(self, fraction: float) -> Path:
        """The checkpoint that the branch with this cooldown_fraction begins with."""
        return self.path / f"branch-{fraction}.pt"

    def check_empty(self) -> None:
        """See that a run can begin here.

        Raises:
            UsageError: if the folder holds something already.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UsageError(f"--run-dir {self.path}: not empty; go on with it by --resume, or name another")

    def check_resumable(self) -> None:
        """See that a run can go on here: under the options that it was started with, or it would be another run.

        Raises:
            UsageError: if there is no checkpoint, or one of other options.
        """
        if not self.checkpoint_path.is_file():
            raise UsageError(f"--resume: no checkpoint in {self.path}")
        before = json.loads((self.path / "config.json").read_text())
        for name in self.config.keys() - _FREE_TO_CHANGE:
            if before.get(name) != self.config[name]:
                option = "number of processes" if name == "world_size" else f"--{name.replace('_', '-')}"
                raise UsageError(f"--resume: {option} is {self.config[name]}, but the run was started with {before.get(name)}")

    def start(self, step: int, trunk: RunFolder | None = None) -> None:
        """Make the folder, write the configuration; keep the metrics of the `step` steps that are done.

        They are in the folder itself, or, of a branch that begins, in its trunk's.

        Raises:
            UsageError: if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", self.config)
        except OSError as error:
            raise UsageError(f"--run-dir {self.path}: cannot be written: {error.strerror or error}") from None
        source = trunk or self
        for name, fields in _FIELDS.items():
            kept = [row for row in source.rows(name) if int(row["step"]) < step] if step else []
            with replacing(self.path / name) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, fields)
                writer.writeheader()
                writer.writerows(kept)

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file of this run, but for one that was cut while it was written.

        Raises:
            UsageError: if the file cannot be read.
        """
        try:
            return read_rows(self.path / name, _FIELDS[name])
        except OSError as error:
            raise UsageError(f"{self.path / name}: cannot be read: {error.strerror or error}") from None

    def add_steps(self, rows: Sequence[Sequence[float]]) -> None:
        """Append rows of `step, epoch, lr, loss` to metrics.csv."""
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def add_epoch(self, row: Mapping[str, Any]) -> None:
        """Append a row to epochs.csv."""
        with (self.path / "epochs.csv").open("a", newline="") as file:
            csv.DictWriter(file, _EPOCH_FIELDS).writerow(row)

    def read_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return summary

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write_json("summary.json", summary)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.path / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")
