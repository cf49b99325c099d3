"""Signals that ask a run to stop: noted when they come, followed between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autowu.training.process import Process

__all__ = ["SAVE", "StopSignals", "Stopped"]

SAVE = 1
"""What is asked where no signal came but a checkpoint is due: below the number of each signal that stops."""

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_ESCALATION_S = 1.0  # a launcher hands on a Ctrl-C that its processes have had already


class Stopped(Exception):
    """A run was stopped by the signal `number`; its checkpoint is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1, within the `with` block. A later second Ctrl-C breaks off at once.

    Args:
        process: this process among those that stop together.
        first_cools: whether the first Ctrl-C asks for a cooldown only; the next ones count as the first and second then.
    """

    def __init__(self, process: Process, first_cools: bool = False) -> None:
        self._process = process
        self._first_cools = first_cools
        self._cools_since: float | None = None  # when that Ctrl-C came
        self._to_cool = False  # it was heard by all, and is still to be followed
        self._cooled = False
        self._came = 0
        self._came_at = 0.0
        self._before: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._answer: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> StopSignals:
        if self._process.world_size > 1 and self._process.device.type == "cuda":
            self._group = dist.new_group(backend="gloo")  # the host does not wait for the device
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._received()

    def asked(self, save: bool = False) -> int:
        """The signal that has come to any of the processes, SAVE where one says so, or 0. All must ask, and get the same answer.

        In a group the answer is that to the last call: it has arrived, so that none waits for the slowest.
        """
        own = self._came or (SAVE if save else 0)
        cools = self._cools_since is not None
        if self._process.world_size == 1:
            self._to_cool = cools
            return own
        last = self._received()
        value = torch.tensor([own, int(cools)])
        self._answer = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value
        if last > SAVE:
            self._received()
        return last

    def _received(self) -> int:
        if self._answer is None:
            return 0
        (work, value), self._answer = self._answer, None
        work.wait()
        number, cools = value.tolist()
        self._to_cool = bool(cools)
        return int(number)

    def cools(self) -> bool:
        """Whether the first Ctrl-C asks for a cooldown, by the answer to the last call of :meth:`asked`; once only."""
        now, self._cooled = self._to_cool and not self._cooled, self._cooled or self._to_cool
        return now

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_cools and number == signal.SIGINT and not self._came:
            first = self._cools_since is None
            self._cools_since = now if self._cools_since is None else self._cools_since
            if first or now - self._cools_since <= _ESCALATION_S:
                return
        if self._came and number == signal.SIGINT and now - self._came_at > _ESCALATION_S:
            raise KeyboardInterrupt
        if not self._came:
            self._came, self._came_at = number, now
