"""State: the copies that a run can go back to, when one is taken, and what happens where copying fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autowu.events import EventLog
from autowu.ranks import Ranks
from autowu.snapshot import Snapshot

__all__ = ["NoRollback", "Restored", "Rollback"]

_T = TypeVar("_T")


class Restored(NamedTuple):
    """A copy that was put back."""

    step: int
    """Optimizer steps that had been taken when it was made."""
    level: float
    """What the loss was then."""


class NoRollback:
    """Of a run that has no model to go back with: nothing is copied."""

    failed = False
    """Whether this rank could not copy its model; the others are told at the next collective."""
    able = False
    """Whether the run can still go back, by all that this rank knows."""
    held: int | None = None
    """Step of the newer copy, None where there is none."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def sound(self, step: int) -> Tensor | None:
        """Whether all that would be copied is finite, and can be: (1,) 1.0 or 0.0; None where nothing would be copied."""
        return None

    def take(self, step: int, lr: float, level: float, share: float) -> None:
        """In the warm-up: copy the run, over the older copy, if a `share` of the LR is no less than the LR of the newer."""

    def renew(self, step: int, level: float) -> None:
        """After the switch: copy the run over the newer copy, if it is sound on all ranks."""

    def keep_one(self, lr: float = math.inf) -> None:
        """Keep the newer of the copies that was made at no more than `lr`, else the older; free the other."""

    def put_back(self, step: int) -> Restored | None:
        """Put the copy back, if all ranks have one."""
        self._ranks.all_agree(torch.zeros(1, dtype=torch.float64))  # the ranks ask each other
        return None

    def give_up(self) -> None:
        """Copy nothing any longer, since a rank cannot."""

    def free(self) -> None:
        """Give the memory of all copies back."""

    def state_dict(self) -> dict[str, Any] | None:
        """The copies themselves, on the host; None where there is none."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Hold the copies that a :meth:`state_dict` was taken of."""


class Rollback(NoRollback):
    """Two copies of a model and its optimizer in the warm-up, one after it.

    That copying fails is survived, by all ranks together: the run goes on without going back.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device | None, ranks: Ranks, log: EventLog) -> None:
        super().__init__(ranks)
        self._log = log
        self._newer, self._older = (Snapshot(model, optimizer, device) for _ in range(2))
        self.able = True

    @property
    def held(self) -> int | None:  # type: ignore[override]
        return self._newer.step if self.able else None

    def sound(self, step: int) -> Tensor | None:
        sound = self._survived(step, Snapshot.sound)
        return torch.zeros(1, dtype=torch.float64, device=self._newer.place) if self.failed else sound

    def take(self, step: int, lr: float, level: float, share: float) -> None:
        if self._newer.step is None or lr * share >= self._newer.lr:
            self._newer, self._older = self._older, self._newer
            self._survived(step, lambda newer: newer.take(step, lr, level))

    def renew(self, step: int, level: float) -> None:
        if not self.able:
            return
        sound = self.sound(step)
        if sound is not None and self._ranks.all_agree(sound):
            self._survived(step, lambda newer: newer.take(step, level=level))

    def keep_one(self, lr: float = math.inf) -> None:
        if self._newer.step is not None and self._newer.lr > lr and self._older.step is not None:
            self._newer, self._older = self._older, self._newer
        self._older.free()

    def put_back(self, step: int) -> Restored | None:
        have = torch.tensor([float(self.held is not None)], dtype=torch.float64)
        if not self._ranks.all_agree(have):
            return None
        if not self._ranks.alone:  # a rank on which this fails must not go on beside those that went back
            self._newer.restore()
        elif self._survived(step, Snapshot.restore) is None:
            return None
        assert self._newer.step is not None
        return Restored(self._newer.step, self._newer.level)

    def give_up(self) -> None:
        self.able = False
        self.free()

    def free(self) -> None:
        self._newer.free()
        self._older.free()

    def state_dict(self) -> dict[str, Any] | None:
        if self.held is None:
            return None
        return {"newer": self._newer.state_dict(), "older": self._older.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        newer, older = (None, None) if state is None or not self.able else (state["newer"], state["older"])
        self._newer.load_state_dict(newer)
        self._older.load_state_dict(older)

    def _survived(self, step: int, act: Callable[[Snapshot], _T]) -> _T | None:
        """`act` on the newer copy, if there still are any; None where that fails."""
        if not self.able or self.failed:
            return None
        try:
            return act(self._newer)
        except Exception as error:
            self._log.once("snapshot", step, f"the model could not be copied ({error}); it will not go back")
            if self._ranks.alone:
                self.give_up()
            else:  # the others, which have a copy, learn it before they could use it
                self.failed = True
                self.free()
            return None
