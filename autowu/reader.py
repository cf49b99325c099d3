"""State: losses on their way to the watch, in blocks.

Those on the host of a single rank are read in blocks of 10 steps too, but at once where one of them could matter: what the watch
says is the same as if it had followed each at its step. Those on a device, or spread over ranks, are read when the next block is
full: by then they have arrived, and nothing waits. In a process group a block is averaged in a collective of its own, because a
divergence must not wait for the next test, and there are no tests after the switch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from autowu.history import LossHistory
from autowu.ranks import Ranks
from autowu.watch import LossWatch

__all__ = ["BLOCK", "LateRead", "Reader"]

BLOCK: Final = 10
"""Steps after which losses are read."""


class LateRead:
    """A tensor on its way to the host; by the time it is wanted it has arrived, and nothing waits."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.to("cpu", copy=True)

    def get(self) -> list[float]:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values

    def __reduce__(self) -> tuple[type[LateRead], tuple[Tensor]]:
        return LateRead, (torch.tensor(self.get(), dtype=self._values.dtype),)


class Reader:
    """Feeds the losses of a run to its watch.

    Attributes:
        watch: the :class:`~autowu.watch.LossWatch`.
        flagged: whether a rank has raised its flag in a block that was read.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.watch = LossWatch()
        self.flagged = False
        self._ranks = ranks
        self._looked_at = 0
        self._pending: LateRead | None = None
        self._low = math.inf  # the lowest loss that was not read yet, or the best mean
        self._quiet = -math.inf  # a loss at most this may wait

    def read(
        self, step: int, loss: float | Tensor, losses: LossHistory, *, flag: bool, due: bool = False, look: bool = False
    ) -> int | None:
        """Have the watch follow the losses since the last look, where a block of them is full, or something may come of one.

        Args:
            step: optimizer steps taken.
            loss: of the last of them.
            losses: the last of them staged, `loss` among them.
            flag: what this rank tells the others, see :attr:`flagged`.
            due: whether the block ends here, full or not.
            look: the same, for a block that is on the host of a single rank.

        Returns:
            The step of the look before; None where nothing was read.
        """
        if step - self._looked_at < BLOCK and not due:
            if not losses.on_host:
                return None
            if not look and -math.inf < loss <= self._quiet:
                if loss < self._low:
                    self._low = float(loss)
                    self._quiet = self.watch.quiet(self._low)
                return None
            if not self._ranks.alone:
                return None
        if step == self._looked_at:
            return None
        unread = step - self._looked_at
        before, self._pending = self._pending, None
        if losses.on_host and self._ranks.alone:
            self._follow(before)
            self.watch.follow(losses.last(unread))
            self._low = self.watch.best
            self._quiet = self.watch.quiet(self._low)
        else:
            self._pending = LateRead(self._ranks.average(losses.staged[-unread:], flag))
            self._follow(before)
        since, self._looked_at = self._looked_at, step
        return since

    def catch_up(self) -> None:
        """Follow what is on its way; waits for the device."""
        before, self._pending = self._pending, None
        self._follow(before)

    def go_back(self, level: float | None) -> None:
        """The run was put back to where the loss was `level`; None where it goes on from here."""
        self.watch.go_back(level)
        self._pending, self._quiet = None, -math.inf

    def begin(self, step: int, level: float | None) -> None:
        """The run begins anew at `step`, after the switch, at a loss of `level`; None where it goes on from here."""
        self.watch.go_back(level, settling=0)
        self._pending, self._quiet, self._looked_at = None, -math.inf, step

    def end(self) -> None:
        """Nothing is watched any longer."""
        self._pending = None

    def _follow(self, block: LateRead | None) -> None:
        if block is None:
            return
        *values, raised = block.get()
        self.flagged = self.flagged or raised > 0
        self.watch.follow(values)

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self.watch.state_dict(),
            "looked_at": self._looked_at,
            "pending": None if self._pending is None else self._pending.get(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self._looked_at, self._quiet, pending = state["looked_at"], -math.inf, state["pending"]
        self._pending = None if pending is None else LateRead(torch.tensor(pending, dtype=torch.float64))
