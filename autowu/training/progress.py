"""Where a run stands: the epochs that are done, and the steps of the one under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autowu.training.process import Process

__all__ = ["Begun", "EpochSteps", "Progress", "StepRow"]


class StepRow(NamedTuple):
    """A row of metrics.csv: a step of the run, from 0, its epoch, from 1, its LR, and its loss as a mean over the processes."""

    step: int
    epoch: int
    lr: float
    loss: float
    phase: str = ""
    probability: float | None = None
    event: str = ""
    """Kinds of what AutoWU met by the end of the step, with spaces between them."""


@dataclass(frozen=True)
class Begun:
    """The part of an epoch that is done where a run goes on within one.

    Attributes:
        lrs: LR of each of its steps.
        losses: their losses, means over the processes.
        random: this process's generators, as :func:`~autowu.training.generators.random_state` gives them; None where the run
            was cut under another number of processes.
        phases: AutoWU's phase at each step.
        probabilities: of the minimum being past, as the last test before each step had it; None before the first.
    """

    lrs: list[float]
    losses: list[float]
    random: dict[str, Any] | None
    phases: list[str] = field(default_factory=list)
    probabilities: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two epochs, or where it goes on within one.

    Attributes:
        epochs: how many are done.
        elapsed: seconds that they took.
        last: the row of epochs.csv of the last of them; empty before the first is done.
        begun: what is done of the next one.
    """

    epochs: int = 0
    elapsed: float = 0.0
    last: Mapping[str, Any] = field(default_factory=dict)
    begun: Begun | None = None

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps that are done."""
        return self.epochs * steps_per_epoch + (0 if self.begun is None else len(self.begun.lrs))

    def after_epoch(self, row: Mapping[str, Any], seconds: float) -> Progress:
        """Where the run stands when one more epoch is done, of which `row` tells and which took `seconds`."""
        return Progress(self.epochs + 1, self.elapsed + seconds, row)


class EpochSteps:
    """The steps of an epoch so far. Their losses are this process's own and stay on the device until they are read.

    Args:
        process: this process among those whose losses are averaged.
        epoch: its number, from 0.
        steps_per_epoch: steps of a whole epoch.
        begun: what is done of it already.
    """

    def __init__(self, process: Process, epoch: int, steps_per_epoch: int, begun: Begun | None = None) -> None:
        self.epoch = epoch
        self.lrs = [] if begun is None else list(begun.lrs)
        self.phases = [] if begun is None else list(begun.phases)
        self.probabilities = [] if begun is None else list(begun.probabilities)
        self.phases += [""] * (len(self.lrs) - len(self.phases))  # earlier versions did not save them
        self.probabilities += [None] * (len(self.lrs) - len(self.probabilities))
        self._process = process
        self._first_step = epoch * steps_per_epoch
        self._steps_per_epoch = steps_per_epoch
        self._earlier = [] if begun is None else list(begun.losses)
        self._losses: list[Tensor] = []

    @property
    def step(self) -> int:
        """Number in the run, from 0, of the step that comes next."""
        return self._first_step + len(self.lrs)

    @property
    def is_complete(self) -> bool:
        return len(self.lrs) == self._steps_per_epoch

    @property
    def phase(self) -> str:
        """Of the last step; empty before it."""
        return self.phases[-1] if self.phases else ""

    @property
    def taken(self) -> int:
        """Steps that this process has taken itself, and not gone on behind."""
        return len(self._losses)

    def add(self, lr: float, phase: str, loss: Tensor, probability: float | None = None) -> None:
        """Note a step: its LR, phase and probability, and this process's loss as a 0-d tensor without gradient."""
        self.lrs.append(lr)
        self.phases.append(phase)
        self.probabilities.append(probability)
        self._losses.append(loss)

    def losses(self) -> list[float]:
        """Mean over the processes, which must all ask at the same step. Waits for the device."""
        if not self._losses:
            return list(self._earlier)
        return self._earlier + self._process.mean(torch.stack(self._losses)).tolist()

    def rows(self, events: Mapping[int, str] | None = None) -> list[StepRow]:
        """The rows of metrics.csv, with losses as in :meth:`losses`; `events` has kinds by the number of steps taken by then."""
        first, events = self._first_step, events or {}
        values = zip(self.lrs, self.losses(), self.phases, self.probabilities, strict=True)
        return [StepRow(first + k, self.epoch + 1, *of_step, events.get(first + k + 1, "")) for k, of_step in enumerate(values)]
