"""What --log-wandb and --log-trackio do: the rows of metrics.csv and epochs.csv go to a tracker of experiments too."""

from __future__ import annotations

import importlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autowu.training.board import curves
from autowu.training.config import TrainConfig, UsageError
from autowu.training.progress import StepRow

__all__ = ["Tracker", "check_trackers", "open_trackers"]

_PACKAGES = ("wandb", "trackio")
_ID = "tracked-as"
"""The file with what tells this run from others there; a run that goes on is the same one."""


def check_trackers(config: TrainConfig) -> None:
    """See that the trackers that are asked for are installed.

    Raises:
        UsageError: if one is not.
    """
    for package in _asked(config):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--log-{package}: needs {package}: pip install {package}")


def open_trackers(config: TrainConfig, folder: Path) -> list[Tracker]:
    """Those that are asked for, of the run in `folder`."""
    return [Tracker(package, config, folder) for package in _asked(config)]


def _asked(config: TrainConfig) -> list[str]:
    return [package for package in _PACKAGES if getattr(config, f"log_{package}")]


class Tracker:
    """A run in W&B or trackio, whose functions have the same names. Where it fails, it says so once, and the run goes on without.

    Args:
        package: which.
        config: of the run.
        folder: of the run.
    """

    def __init__(self, package: str, config: TrainConfig, folder: Path) -> None:
        self._package = package
        self._module: Any = None
        options: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
        own = _own_id(folder)
        arguments = {"project": config.wandb_project, "name": f"{folder.name}-{own}", "config": options, "resume": "allow"}
        if package == "wandb":
            arguments |= {"id": own, "dir": str(folder)}
        self._try(lambda: self._begin(arguments))

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        module = importlib.import_module(self._package)
        module.init(**arguments)
        self._module = module

    def epoch(self, steps: Sequence[StepRow], row: Mapping[str, Any]) -> None:
        """Add an epoch: its rows of metrics.csv, and its row of epochs.csv."""
        self._try(lambda: self._log(steps, row))

    def _log(self, steps: Sequence[StepRow], row: Mapping[str, Any]) -> None:
        events = {of_step.step: {"events": of_step.event} for of_step in steps if of_step.event}
        for step, values in curves(steps, row):
            if self._module is not None:
                self._module.log(values | events.get(step, {}), step=step)

    def close(self) -> None:
        """All is sent, or written."""
        self._try(lambda: None if self._module is None else self._module.finish())

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # of the network, of an account: none of it is worth a run
            self._module = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"--log-{self._package}: {reason}; the run goes on without it", file=sys.stderr, flush=True)


def _own_id(folder: Path) -> str:
    path = folder / _ID
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
