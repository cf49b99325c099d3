"""State: losses on their way to the watch, in blocks.

Those on the host of a single rank wait until there are 10, but for one that could matter: what the watch says is the same as if it
had followed each at its step. Those on a device, or spread over ranks, are read in blocks of 10 steps, each when the next is full:
by then they have arrived, and nothing waits. In a process group a block is averaged in a collective of its own, because a
divergence must not wait for the next test, and there are no tests after the switch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from autowu.history import LossHistory
from autowu.ramp import Ramp
from autowu.ranks import Ranks
from autowu.watch import BLOCK, HUGE, LossWatch, Quiet

__all__ = ["LateRead", "Reader"]


class LateRead:
    """A tensor on its way to the host, and numbers there that go with it; by the time it is wanted it has arrived."""

    def __init__(self, values: Tensor, *more: float) -> None:
        self._event: torch.cuda.Event | None = None
        self._more = more
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.to("cpu", copy=True)

    def get(self) -> list[float]:
        """The values, and the numbers after them."""
        if self._event is not None:
            self._event.synchronize()
        return [*self._values.tolist(), *self._more]

    def __reduce__(self) -> tuple[type[LateRead], tuple[Tensor]]:
        return LateRead, (torch.tensor(self.get(), dtype=self._values.dtype),)


class Reader:
    """Feeds the losses of a run to its watch, or to the ramp that is under way.

    Attributes:
        watch: the :class:`~autowu.watch.LossWatch`.
        ramp: the losses of the :class:`~autowu.ramp.Ramp` since :meth:`begin_ramp`; they are none of the watch's.
        flagged: whether a rank has raised its flag in a block that was read.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.watch = LossWatch()
        self.ramp: Ramp | None = None
        self.flagged = False
        self._ranks = ranks
        self._looked_at = 0  # step
        self._pending: LateRead | None = None
        self._unread: list[float] = []  # losses on the host that may wait
        self._low = math.inf  # the lowest of them, or the best mean
        self._quiet: Quiet | None = None  # which may
        self._bound = -math.inf  # a loss at most this may wait

    def follows_at_once(self, loss: float | Tensor, losses: LossHistory) -> TypeGuard[float]:
        """Whether a loss that goes with `losses` need not travel: it is on the host of a single rank."""
        return type(loss) is float and losses.on_host and self._ranks.alone

    def follow(self, step: int, loss: float, *, look: bool = False) -> int | None:
        """Follow a loss on the host. It may wait for others where nothing can come of it and nobody wants to `look` at the watch.

        Returns:
            The step of the look before, always that before `step`; None where the loss waits.
        """
        unread, self._looked_at = self._unread, step
        unread.append(loss)
        if not look and -HUGE < loss <= self._bound and len(unread) < BLOCK:
            if loss < self._low and self._quiet is not None:
                self._low, self._bound = loss, self._quiet.bound(loss)
            return None
        self.catch_up()
        self._low, self._quiet = self.watch.best, self.watch.quiet()
        self._bound = -math.inf if self._quiet is None else self._quiet.bound(self._low)
        return step - 1

    def read_block(self, step: int, losses: LossHistory, *, flag: bool, due: bool = False) -> int | None:
        """Send the block that ends with `step` on its way, where it is full or `due`, and follow the one before.

        Args:
            step: optimizer steps taken.
            losses: the last of them staged.
            flag: what this rank tells the others, see :attr:`flagged`.
            due: whether the block ends here, full or not.

        Returns:
            The step of the look before; None where the block is not full.
        """
        if self._unread:  # until now there was one rank, or the losses were on the host
            self.catch_up()
        if step - self._looked_at < BLOCK and not due:
            return None
        own = losses.staged[self._looked_at - step :]
        block = LateRead(own, float(flag)) if self._ranks.alone else LateRead(self._ranks.average(own, flag))
        before, self._pending = self._pending, block
        self._follow(before)
        since, self._looked_at = self._looked_at, step
        return since

    def catch_up(self) -> None:
        """Follow all that waits or is on its way; waits for the device."""
        before, self._pending = self._pending, None
        self._follow(before)
        (self.ramp or self.watch).follow(self._unread)
        self._unread = []  # another list: what holds this one may have to put it back

    def follow_skipped(self, loss: float) -> None:
        """Follow a loss that is of no step."""
        self.watch.follow([*self._unread, loss])
        self.forget()

    def go_back(self, level: float | None) -> None:
        """The run was put back to where the loss was `level`; None where it goes on from here."""
        self.watch.go_back(level, trial=True)
        self.forget()

    def begin(self, step: int, level: float | None) -> None:
        """The run begins anew at `step`, after the switch, at a loss of `level`; None where it goes on from here."""
        self.watch.go_back(level, settling=0)
        self.forget()
        self._looked_at = step

    def begin_ramp(self, ramp: Ramp) -> None:
        """What comes from now on is of a ramp; all before it has been followed."""
        self.forget()
        self.ramp = ramp

    def end_ramp(self, step: int) -> None:
        """The run goes on at `step` as it was before the ramp, and so does the watch."""
        self.forget()
        self.ramp, self._looked_at = None, step

    def forget(self) -> None:
        """What was not followed yet is wanted no longer."""
        self._pending, self._quiet, self._bound = None, None, -math.inf
        self._unread = []  # another list: what holds this one may have to put it back

    def _follow(self, block: LateRead | None) -> None:
        if block is None:
            return
        *values, raised = block.get()
        self.flagged = self.flagged or raised > 0
        (self.ramp or self.watch).follow(values)

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self.watch.state_dict(),
            "looked_at": self._looked_at,
            "unread": list(self._unread),
            "pending": None if self._pending is None else self._pending.get(),
            **({} if self.ramp is None else {"ramp": self.ramp.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch = LossWatch()
        self.watch.load_state_dict(state["watch"])
        self.forget()
        self.ramp = None if (ramp := state.get("ramp")) is None else Ramp.of(ramp)
        self._looked_at, self._unread, pending = state["looked_at"], list(state["unread"]), state["pending"]
        self._pending = None if pending is None else LateRead(torch.tensor(pending, dtype=torch.float64))
