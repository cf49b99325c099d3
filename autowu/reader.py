"""State: losses on their way to the watch: followed at once where the host has them, else in blocks that are read late.

Losses on a device, or spread over ranks, are read in blocks of 10 steps, each when the next is full: by then it has arrived, and
nothing waits. In a process group a block is averaged in a collective of its own, because a divergence must not wait for the next
test, and there are no tests after the switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from autowu.history import LossHistory
from autowu.ranks import Ranks
from autowu.watch import LossWatch

__all__ = ["BLOCK", "LateRead", "Reader"]

BLOCK: Final = 10
"""Steps after which losses that are on a device or spread over ranks are read."""


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

    def follows_at_once(self, loss: float | Tensor, losses: LossHistory) -> bool:
        """Whether a loss that goes with `losses` need not wait for a block: those of one process, on the host."""
        return not isinstance(loss, Tensor) and losses.device.type == "cpu" and self._ranks.alone

    def follow(self, step: int, loss: float) -> int:
        """Follow the loss of `step` at once; the step of the look before."""
        self.watch.push(loss)
        since, self._looked_at = self._looked_at, step
        return since

    def read_block(self, step: int, losses: LossHistory, flag: bool, due: bool = False) -> int | None:
        """Send the block that ends with `step` on its way, where it is full or `due`, and follow the one before.

        Args:
            losses: the last of them staged.
            flag: what this rank tells the others, see :attr:`flagged`.

        Returns:
            The step of the look before; None where the block is not full.
        """
        if step - self._looked_at < BLOCK and not due:
            return None
        block = self._ranks.average(losses.staged[self._looked_at - step :], flag)
        before, self._pending = self._pending, LateRead(block)
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
        self._pending = None

    def begin(self, step: int, level: float | None) -> None:
        """The run begins anew at `step`, after the switch, at a loss of `level`; None where it goes on from here."""
        self.watch.go_back(level, settling=0)
        self._pending, self._looked_at = None, step

    def end(self) -> None:
        """Nothing is watched any longer."""
        self._pending = None

    def _follow(self, block: LateRead | None) -> None:
        if block is None:
            return
        *values, raised = block.get()
        self.flagged = self.flagged or raised > 0
        for value in values:
            self.watch.push(value)

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self.watch.state_dict(),
            "looked_at": self._looked_at,
            "pending": None if self._pending is None else self._pending.get(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self._looked_at, pending = state["looked_at"], state["pending"]
        self._pending = None if pending is None else LateRead(torch.tensor(pending, dtype=torch.float64))
