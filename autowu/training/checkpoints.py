"""The state of a run, on all processes, to a file and back."""

from __future__ import annotations

import math
import sys
import textwrap
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autowu.training.build import Parts
from autowu.training.config import TrainConfig, UsageError
from autowu.training.files import link, remove, replacing, save, sync_folder
from autowu.training.folder import RunFolder
from autowu.training.generators import random_state
from autowu.training.process import Process
from autowu.training.progress import Begun, EpochSteps, Progress
from autowu.training.shards import consolidated, read_shards, write_shards

__all__ = ["Checkpoints", "load_model", "mean_of_losses", "read_checkpoint", "write_checkpoint"]


class Checkpoints:
    """Saves and loads the state of a run. All processes save and load together; the main one writes.

    Args:
        parts: what is saved and loaded.
        process: this process among those of the run.
        folder: where the checkpoints lie.
        config: says how often they are saved, how many are kept, and whether without AutoWU's copies of model and optimizer.
        branches: for each cooldown_fraction that branches off this run, the step that it begins with.
    """

    def __init__(
        self,
        parts: Parts,
        process: Process,
        folder: RunFolder,
        config: TrainConfig,
        branches: Mapping[float, int] | None = None,
    ) -> None:
        self._parts = parts
        self._process = process
        self._folder = folder
        self._branches = branches or {}
        self._config = config
        self._saved_at = time.monotonic()
        self._best: tuple[float, float] | None = None

    def load_newest(self) -> Progress:
        """Set the parts to the newest checkpoint that is whole, on all processes; where the run stood. A broken one is set aside.

        Raises:
            UsageError: if there are checkpoints, and none of them is whole.
        """
        paths = self._process.on_main(self._folder.checkpoints)
        errors: list[UsageError] = []
        for path in paths:
            progress = error = None
            try:
                progress = self.load(path)
            except UsageError as raised:
                error = raised
            error = next(filter(None, self._process.gather(error)), None)
            if error is None and progress is not None:
                if self._process.is_main:
                    self._set_aside(paths[: len(errors)], errors, path)
                return progress
            errors += [error] if error else []
        if errors:
            raise UsageError(f"{errors[0]}; no other can be used")
        return Progress()

    def _set_aside(self, broken: Sequence[Path], errors: Sequence[UsageError], used: Path) -> None:
        """Say why, and keep them where they do not count: a newer checkpoint would take the place of the last whole one."""
        for path, error in zip(broken, errors, strict=True):
            aside = path.with_name(f"{path.name}.broken")
            remove(aside)
            path.replace(aside)
            print(f"{error}; set aside, going on from {used.name}", file=sys.stderr, flush=True)

    def load(self, path: Path) -> Progress:
        """Set the parts to the state in `path`; where the run stood.

        Raises:
            UsageError: if the file is damaged, or no checkpoint of such a run.
        """
        state = read_shards(path, self._process) if self._config.fsdp else read_checkpoint(path)
        try:
            self._parts.model.load_state_dict(state["model"])
            self._parts.optimizer.load_state_dict(state["optimizer"])
            self._parts.scheduler.load_state_dict(self._of_this_process(state["scheduler"]))
            self._parts.load_extra_state(state)
            begun = state.get("begun")
            if begun is not None:
                same = len(begun["random"]) == self._process.world_size
                begun = Begun(**begun | {"random": begun["random"][self._process.rank] if same else None})
            return Progress(state["epoch"], state["elapsed"], state["last"], begun)
        except Exception as error:  # each part raises errors of its own on what it cannot load
            raise UsageError(f"{path}: no checkpoint of this run: {_in_a_line(error)}") from None

    def is_step(self, step: int) -> bool:
        """Whether ``--checkpoint-steps`` asks for a checkpoint when `step` steps are done."""
        return self._config.checkpoint_steps is not None and step % self._config.checkpoint_steps == 0

    def is_time(self) -> bool:
        """Whether ``--checkpoint-minutes`` asks for a checkpoint now: by the main process's clock, and once."""
        minutes, now = self._config.checkpoint_minutes, time.monotonic()
        if minutes is None or not self._process.is_main or now - self._saved_at < 60 * minutes:
            return False
        self._saved_at = now
        return True

    def save(self, progress: Progress) -> None:
        """Renew the checkpoint of the run, between two epochs; and that of the best epoch, where this is it."""
        self._renew(self._state(progress, self._parts.scheduler.state_dict()), self._rank(progress.last))

    def save_within(self, progress: Progress, steps: EpochSteps) -> None:
        """Renew the checkpoint of the run, within the epoch that these steps are of."""
        self._renew(self._within(progress, steps, self._parts.scheduler.state_dict()))

    def save_branches(self, progress: Progress, steps: EpochSteps) -> None:
        """Save the state of each branch that leaves before the step that comes next."""
        if steps.is_complete:  # the test changes the batch-norm statistics: the branch leaves from the next epoch's begin
            return
        for fraction, first_step in self._branches.items():
            if first_step == steps.step:
                self._save_branch(fraction, progress, steps)

    def _save_branch(self, fraction: float, progress: Progress, steps: EpochSteps) -> None:
        assert self._parts.autowu is not None
        state = self._within(progress, steps, self._parts.autowu.fork_cooldown(fraction))
        path = self._folder.branch_path(fraction)
        if self._config.fsdp:
            self._move(write_shards(state, path, self._process), path)
        elif self._process.is_main:
            write_checkpoint(state, path)

    def _within(self, progress: Progress, steps: EpochSteps, scheduler_state: dict[str, Any]) -> dict[str, Any]:
        state = self._state(progress, scheduler_state)
        state["step_in_epoch"] = len(steps.lrs)
        random = self._of_each(random_state(self._process.device))
        state["begun"] = {"lrs": list(steps.lrs), "losses": steps.losses(), "random": random}
        state["begun"] |= {"phases": list(steps.phases), "probabilities": list(steps.probabilities)}
        return state

    def _state(self, progress: Progress, scheduler_state: dict[str, Any]) -> dict[str, Any]:
        return {
            "epoch": progress.epochs,
            "elapsed": progress.elapsed,
            "last": dict(progress.last),
            "model": self._parts.model.state_dict(),
            "optimizer": self._parts.optimizer.state_dict(),
            "scheduler": self._of_all_processes(scheduler_state),
            **self._parts.extra_state(),
        }

    def _of_all_processes(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The schedulers' states by rank. The copies of the model are alike: each keeps its own, none travels."""
        in_ramp = self._parts.autowu is not None and self._parts.autowu.in_ramp  # whose weights only a copy mends
        if self._config.small_checkpoints and "snapshot" in state and not in_ramp:
            state = state | {"snapshot": None}
        if self._config.fsdp or "snapshot" not in state:
            return self._of_each(state)
        states = self._process.gather(state | {"snapshot": None})
        states[self._process.rank] = state
        return states

    def _of_each(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """By rank; where every process writes, it has its own only."""
        return [value] if self._config.fsdp else self._process.gather(value)

    def _of_this_process(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """This process's of the states that the main one saved, which alone has the copy of the model.

        Of another number of processes each has the mean of their losses.
        """
        own = states[self._process.rank] if len(states) == self._process.world_size else mean_of_losses(states)
        return own | {"snapshot": states[0]["snapshot"]} if "snapshot" in own else own

    def _renew(self, state: Mapping[str, Any], rank: tuple[float, float] | None = None) -> None:
        """Write the newest checkpoint; first, from the same file, the best epoch's, which a kill would otherwise leave out."""
        self._saved_at = time.monotonic()
        if self._config.fsdp:
            self._renew_shards(state, rank)
            return
        if not self._process.is_main:
            return
        with replacing(self._folder.checkpoint_path) as partial:
            save(state, partial)
            if rank is not None and rank > self._best_rank():
                link(partial, self._folder.best_path)
                self._best = rank
            self._folder.shift_checkpoints(self._config.checkpoint_hist)

    def _renew_shards(self, state: Mapping[str, Any], rank: tuple[float, float] | None) -> None:
        """The same, by all processes together; the best epoch's weights are whole, in one file."""
        path = self._folder.checkpoint_path
        partial = write_shards(state, path, self._process)
        if rank is not None and self._process.on_main(lambda: rank > self._best_rank()):
            whole = {name: consolidated(state[name]) for name in ("model", "ema") if name in state}
            if self._process.is_main:
                write_checkpoint({"epoch": state["epoch"], "last": state["last"], **whole}, self._folder.best_path)
                self._best = rank
        if self._process.is_main:
            self._folder.shift_checkpoints(max(2, self._config.checkpoint_hist))  # until the new one is there
            self._move(partial, path)
            self._folder.drop_checkpoints(self._config.checkpoint_hist)

    def _move(self, partial: Path, path: Path) -> None:
        if self._process.is_main:
            remove(path)
            partial.replace(path)
            sync_folder(path.parent)

    def _best_rank(self) -> tuple[float, float]:
        """That of ``best.pt``, by the row of epochs.csv that it holds."""
        if self._best is None:
            try:
                self._best = self._rank(torch.load(self._folder.best_path, "cpu", weights_only=True, mmap=True)["last"])
            except Exception:  # there is none, or it is broken: the next epoch is the best
                self._best = (-math.inf, -math.inf)
        return self._best

    @staticmethod
    def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
        """By accuracy, then by loss; the best is the largest."""
        accuracy, loss = row.get("test_accuracy", -math.inf), row.get("test_loss", math.inf)
        return accuracy, -loss if math.isfinite(loss) else -math.inf


def mean_of_losses(states: Sequence[Any], name: str = "") -> Any:
    """The first of the states of several processes, but for losses that are each one's own: their mean, where they are finite."""
    first = states[0]
    if isinstance(first, dict) and all(isinstance(state, dict) and state.keys() == first.keys() for state in states):
        return {key: mean_of_losses([state[key] for state in states], key) for key in first}
    if name != "losses" or not all(isinstance(state, Tensor) and state.shape == first.shape for state in states):
        return first
    values = torch.stack(list(states))
    known = values.isfinite()
    mean = torch.where(known, values, 0.0).sum(0) / known.sum(0)
    return torch.where((values == first).all(0) | ~known.any(0), first, mean)


def load_model(path: Path, model: nn.Module) -> None:
    """Give `model` the weights in a checkpoint that the run tested: their average, where it kept one.

    Raises:
        UsageError: if it is damaged, or of another model.
    """
    try:
        state = read_shards(path, None) if path.is_dir() else read_checkpoint(path)
        model.load_state_dict(state["ema"] if "ema" in state else state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: no checkpoint of this model: {_in_a_line(error)}") from None


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Replace the file in one move, so that a cut never leaves half of one.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as partial:
        save(state, partial)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a file, on the CPU.

    Raises:
        UsageError: if the file cannot be read, or is not what was written; torch writes checksums and does not look at them.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    except Exception as error:  # whatever is raised on bytes of any kind
        raise UsageError(f"{path}: damaged, or no checkpoint: {_in_a_line(error)}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of torch, or of another program
        raise UsageError(f"{path}: no checkpoint of train.py: {_in_a_line(error)}") from None
    if not isinstance(state, dict):
        raise UsageError(f"{path}: no checkpoint of train.py: it holds a {type(state).__name__}")
    return state


def _in_a_line(error: Exception) -> str:
    kind = type(error).__name__
    return f"{kind}: {textwrap.shorten(str(error), 200)}".removesuffix(": ")
