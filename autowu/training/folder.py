"""The folder of a run: where each of its files is, and what is in them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autowu.training.batches import SPLIT
from autowu.training.config import TrainConfig, UsageError, parse_args
from autowu.training.files import read_rows, remove, replacing
from autowu.training.progress import StepRow

__all__ = ["RunFolder"]

_FREE_TO_CHANGE = {"recipe", "dataset_download", "resume", "run_dir", "workers", "device", "skip_corrupt", "small_checkpoints"}
_FREE_TO_CHANGE |= {"checkpoint_steps", "checkpoint_minutes", "checkpoint_hist", "log_tensorboard", "eval", "dry_run"}
_FREE_TO_CHANGE |= {"log_wandb", "log_trackio", "wandb_project"}
_LOCK = ".lock"
_OLDER = re.compile(r"checkpoint\.(\d+)(\.pt)?")

_STEP_FIELDS = StepRow._fields
_EPOCH_FIELDS = ("epoch", "step", "phase", "lr", "train_loss", "test_loss", "test_accuracy", "seconds", "images_per_s")
_FIELDS = {"metrics.csv": _STEP_FIELDS, "epochs.csv": _EPOCH_FIELDS}


class RunFolder:
    """The folder of one run, or of a branch of one, which is a folder in that of its trunk.

    Nothing is made before :meth:`claim` or :meth:`start`. The lock of the trunk's folder is that of its branches too.

    ``config.json``, ``metrics.csv`` (a row an optimizer step), ``epochs.csv`` (a row an epoch), ``checkpoint.pt`` (renewed after
    every epoch; ``checkpoint.1.pt`` is the one before it, and so on), ``best.pt`` (the checkpoint of the best epoch), and at the
    end ``summary.json`` and ``figure.png``. :class:`~autowu.training.layers.LayerLog` writes there too.
    """

    def __init__(self, config: TrainConfig, world_size: int) -> None:
        self.path = config.run_dir
        self._suffix = "" if config.fsdp else ".pt"  # each is a folder there
        self.checkpoint_path = self.path / f"checkpoint{self._suffix}"
        self.best_path = self.path / "best.pt"
        as_read = json.loads(json.dumps(asdict(config), default=str))  # a tuple among --opt-kwargs is a list there
        self.config: dict[str, Any] = as_read | {"world_size": world_size}
        self._resume = config.resume
        self._can_be_extended = config.sched not in ("cosine", "poly") and not isinstance(config.cooldown_fraction, list)
        self._lock: int | None = None

    def branch_path(self, fraction: float) -> Path:
        """The checkpoint that the branch with this cooldown_fraction begins with."""
        return self.path / f"branch-{fraction}{self._suffix}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that the run can go on from, the newest first."""
        older = sorted((int(name[1]), path) for path in self.path.glob("checkpoint.*") if (name := _OLDER.fullmatch(path.name)))
        return [path for path in (self.checkpoint_path, *(path for _, path in older)) if path.exists()]

    def shift_checkpoints(self, keep: int) -> None:
        """Make room for a newer checkpoint, with which at most `keep` are there.

        What a kill has left between two moves is in order, with a gap: only what is in front of the gap moves.
        """
        places = [self.checkpoint_path, *(self.path / f"checkpoint.{k}{self._suffix}" for k in range(1, keep))]
        for path in self.checkpoints()[1:]:
            if path not in places:
                remove(path)
        gap = next((k for k, path in enumerate(places) if not path.exists()), keep - 1)
        for k in range(gap, 0, -1):
            if places[k].is_dir():  # which no move replaces
                remove(places[k])
            places[k - 1].replace(places[k])

    def drop_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep`."""
        for path in self.checkpoints()[keep:]:
            remove(path)

    def check(self) -> None:
        """See that a run can begin here, or go on where it is to be resumed.

        Raises:
            UsageError: as :meth:`check_empty` and :meth:`check_resumable`.
        """
        if self._resume and (self._resume != "auto" or (self.path / "config.json").exists()):
            self.check_resumable()
        else:
            self.check_empty()

    def claim(self) -> None:
        """Make the folder and lock it for this process, until :meth:`release` or its death; see again that it can be used.

        Raises:
            UsageError: if another process has it, if it cannot be written, or as :meth:`check`.
        """
        with self._made():
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no lock that loader processes would inherit
        except (BlockingIOError, PermissionError):
            raise UsageError(f"--run-dir {self.path}: in use by another process") from None
        except (ImportError, OSError):
            pass  # a system, or a file system, without locks
        self.check()

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_empty(self) -> None:
        """See that a run can begin here.

        Raises:
            UsageError: if the folder holds something already.
        """
        if self._holds_something():
            raise UsageError(f"--run-dir {self.path}: not empty; go on with it by --resume, or name another")

    def check_resumable(self) -> None:
        """See that a run can go on here: under the options that it was started with, or it would be another run.

        More epochs extend it; not a cosine, a polynomial or several cooldowns, which were laid out for the epochs that they had.
        An option that is newer than the run had its default there.

        Raises:
            UsageError: if there is no run, or one of other options.
        """
        path = self.path / "config.json"
        if not path.is_file():
            if self.path.is_dir() and not self._holds_something():
                return  # killed before it wrote anything
            raise UsageError(f"--resume: no run in {self.path}")
        try:
            before = {"world_size": 1, **asdict(parse_args([])), **json.loads(path.read_text())}
            its = _images_a_step(before)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"--resume: {path} cannot be read: {error}") from None
        free = _FREE_TO_CHANGE
        if before["world_size"] != self.config["world_size"]:
            self._check_step(its, before["world_size"])
            free = free | set(SPLIT)
        for name in (name for name in self.config if name not in free):
            can_grow = name == "epochs" and self._can_be_extended and isinstance(before[name], int)
            if can_grow and before[name] < self.config[name]:
                continue
            if before.get(name) != self.config[name]:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"--resume: {option} is {self.config[name]}, but the run was started with {before.get(name)}")
        self.config |= {name: before[name] for name in SPLIT}  # as it was started

    def _check_step(self, images: int, processes: int) -> None:
        """See that a step takes as many images as that of a run that was started on another number of processes."""
        if (own := _images_a_step(self.config)) != images:
            raise UsageError(
                f"--resume: a step of {self.config['world_size']} processes takes {own} images, but the run was started with "
                f"{images} on {processes}; give --global-batch-size {images}"
            )

    def start(self, step: int, trunk: RunFolder | None = None) -> None:
        """Make the folder, write the configuration; keep the metrics of the `step` steps that are done.

        They are in the folder itself, or, of a branch that begins, in its trunk's.

        Raises:
            UsageError: if the folder cannot be written.
        """
        with self._made():
            self.write_json("config.json", self.config)
        source = trunk or self
        for name, fields in _FIELDS.items():
            kept = [row for row in source.rows(name) if int(row["step"]) < step] if step else []
            with replacing(self.path / name) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, fields)
                writer.writeheader()
                writer.writerows(kept)

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file of this run, but for one that was cut while it was written, and what is of no step.

        Raises:
            UsageError: if the file cannot be read.
        """
        try:
            return [row for row in read_rows(self.path / name, _FIELDS[name]) if row["step"].isdecimal()]
        except OSError as error:
            raise UsageError(f"{self.path / name}: cannot be read: {error.strerror or error}") from None

    def add_steps(self, rows: Sequence[StepRow]) -> None:
        """Append rows to metrics.csv."""
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def add_epoch(self, row: Mapping[str, Any]) -> None:
        """Append a row to epochs.csv."""
        with (self.path / "epochs.csv").open("a", newline="") as file:
            csv.DictWriter(file, _EPOCH_FIELDS).writerow(row)

    @contextmanager
    def _made(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UsageError(f"--run-dir {self.path}: cannot be written: {error.strerror or error}") from None

    def _holds_something(self) -> bool:
        """Whether more is there than what a run leaves that was killed before its first file."""
        return self.path.is_dir() and any(p.name != _LOCK and p.suffix != ".partial" for p in self.path.iterdir())

    def read_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return summary

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write_json("summary.json", summary)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.path / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")


def _images_a_step(fields: Mapping[str, Any]) -> int:
    factors = {name: fields[name] for name in ("world_size", "batch_size", "grad_accum")}
    for name, value in factors.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}")
    return math.prod(factors.values())
