"""State: the copies that a run can go back to, when one is taken, and what happens where copying fails."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from autowu.events import EventLog
from autowu.live import LiveRun
from autowu.ranks import Ranks
from autowu.snapshot import Snapshot

__all__ = ["NoRollback", "Restored", "Rollback"]

_T = TypeVar("_T")

_FAR: Final = 30.0
"""Times the LR of the newer copy, at which a run is copied though it has been better; then the LRs say which copy is put back."""


class Restored(NamedTuple):
    """A copy that was put back."""

    step: int
    """Optimizer steps that had been taken when it was made."""
    level: float
    """What the loss was then."""


class NoRollback:
    """Of a run that is not to go back: nothing is copied."""

    failed = False
    """Whether this rank could not copy its part; the others are told at the next collective."""
    able = False
    """Whether the run can still go back, by all that this rank knows."""
    held: int | None = None
    """Step of the newer copy, None where there is none."""
    _why_lost = "nothing was copied: start again from a checkpoint, without rollback=False"

    def __init__(self, live: LiveRun, ranks: Ranks, log: EventLog) -> None:
        self._live, self._ranks, self._log = live, ranks, log

    def sound(self, step: int) -> Tensor | None:
        """Whether all that would be copied is finite, and can be: (1,) 1.0 or 0.0; None where nothing would be copied."""
        return None

    def take(self, step: int, lr: float, level: float, share: float) -> None:
        """In the warm-up: copy the run, over the older copy, if a `share` of the LR is no less than the LR of the newer."""

    def pass_by(self, step: int, lr: float, level: float, share: float) -> None:
        """In the warm-up, as :meth:`take`, of a run that has been better: the newer copy stays, up to thirty times its LR."""

    def renew(self, step: int, level: float) -> None:
        """After the switch: copy the run over the newer copy, if it is sound on all ranks."""

    def is_held(self, step: int) -> bool:
        """Whether all ranks hold a copy of `step`."""
        return False

    def moved(self, step: int) -> Tensor | None:
        """Norms of what this rank's weights have moved by since the copy of `step`, see :class:`~autowu.snapshot.Snapshot`.

        None where that is not held.
        """
        return None

    def is_whole(self) -> bool:
        """Whether the copies of all ranks have all that training changes: with `model=`, its buffers, too."""
        return False

    def keep_one(self, lr: float = math.inf) -> None:
        """Keep the newer copy, if it was made at no more than `lr` or has been passed by, else the older; free the other.

        Of two whose LRs lie thirtyfold apart the older is kept, too, where it is nearer to `lr` than one that has been passed by.
        """

    def keep_best(self, step: int, level: float) -> None:
        """After the switch: copy the run over the older copy, as the best by held-out losses, if it is sound on all ranks."""

    def put_back_best(self, step: int) -> Restored | None:
        """Put the best one back, if all ranks have one; it is then the newer copy, too."""
        return self.put_back(step)

    def put_back(self, step: int) -> Restored | None:
        """Put the copy back, if all ranks have one."""
        return None

    def lost(self, step: int) -> bool:
        """Whether weights of the run are not finite, on any rank, which it cannot train away: said once, as an error."""
        return self._is_told_of_loss(step, self._ranks.all_agree(self._finite(step)))

    def lost_here(self, step: int) -> bool:
        """The same of this rank alone, without a collective: what another has lost comes to this one with its next step."""
        return self._is_told_of_loss(step, bool(self._finite(step)))

    def _is_told_of_loss(self, step: int, finite: bool) -> bool:
        if not finite:
            self._log.fail("lost", step, f"weights or the optimizer's state are not finite, and {self._why_lost}")
        return not finite

    def _finite(self, step: int) -> Tensor:
        try:
            return self._live.sound()
        except Exception as error:
            self._log.once("snapshot", step, f"whether the weights are finite could not be found out ({error})")
            return torch.ones(1, dtype=torch.float64)

    def go_on(self, step: int, goes_back: bool) -> None:
        """A state of `step` was loaded: its run did not go back where `goes_back` is False, nor does this one."""

    def give_up(self) -> None:
        """Copy nothing any longer, since a rank cannot."""

    def free(self) -> None:
        """Give the memory of all copies back."""

    def free_newer(self) -> None:
        """Give the memory of the newer copy back."""

    def state_dict(self) -> dict[str, Any] | None:
        """The copies themselves, on the host; None where there is none."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Hold the copies that a :meth:`state_dict` was taken of."""


class Rollback(NoRollback):
    """Two copies of what a run changes in the warm-up; after it one, and the best by held-out losses where there are any.

    That copying fails is survived, by all ranks together: the run goes on without going back.

    Args:
        device: where the copies are held, see :class:`~autowu.snapshot.Snapshot`.
        on_rollback: is called with the step of a copy that was put back.

    Raises:
        ValueError: if another run goes back with parts of this one's model.
    """

    _why_lost = "no copy mends them: start again from a checkpoint, with a lower max_lr or clipped gradients"

    def __init__(
        self,
        live: LiveRun,
        ranks: Ranks,
        log: EventLog,
        device: torch.device | None = None,
        on_rollback: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__(live, ranks, log)
        self._newer, self._older = (Snapshot(live, device) for _ in range(2))
        self._on_rollback = on_rollback
        self._passed_by = False  # whether a copy was due since the newer was made, of a run that had been better then
        self.able = True
        if lazy := [label for label, parameter in live.everything().items() if is_lazy(parameter)]:
            raise ValueError(f"model: its parameter {lazy[0]!r} has no values yet; pass a batch through the model first")
        _claim(self)
        log.say(self._describe())

    def _describe(self) -> str:
        tensors = {key: t for key, t in self._live.look().tensors.items() if key[0] in ("parameter", "buffer")}
        size = sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6
        what = "parameters (without model= no statistics of batch norm)" if self._live.model is None else "parameters and buffers"
        place = self._newer.device or self._live.place
        return (
            f"AutoWU goes back to a copy where training overshoots: at most two of {size:.4g} MB of {what}, and of the optimizer's "
            f"state, on {place}; rollback=False turns it off"
        ) + (f"; buffers that cannot be copied stay as they are: {_some(left)}" if (left := self._live.uncopied()) else "")

    @property
    def held(self) -> int | None:  # type: ignore[override]
        return self._newer.step if self.able else None

    def sound(self, step: int) -> Tensor | None:
        sound = self._survived(step, lambda newer: newer.live.sound())
        return torch.zeros(1, dtype=torch.float64, device=self._live.place) if self.failed else sound

    def take(self, step: int, lr: float, level: float, share: float) -> None:
        if self._newer.step is None or lr * share >= self._newer.lr:
            self._newer, self._older = self._older, self._newer
            self._passed_by = False
            self._copy(step, lr, level)

    def _copy(self, step: int, lr: float, level: float) -> None:
        """Copy the run over the newer copy; it may go back from here on."""
        self._survived(step, lambda newer: newer.take(step, lr, level))
        if self.held is not None:
            _CLAIMED.add(self)

    def pass_by(self, step: int, lr: float, level: float, share: float) -> None:
        if self._newer.step is None or lr >= _FAR * self._newer.lr:  # it has learnt much since, and the loss may be another
            self.take(step, lr, level, share)
        else:
            self._passed_by = self._passed_by or lr * share >= self._newer.lr

    def renew(self, step: int, level: float) -> None:
        if not self.able:
            return
        sound = self.sound(step)
        if sound is not None and self._ranks.all_agree(sound):
            self._copy(step, 0.0, level)

    def is_held(self, step: int) -> bool:
        return self._all(self.held == step and not self.failed)

    def moved(self, step: int) -> Tensor | None:
        return self._survived(step, Snapshot.moved) if self.held == step else None

    def is_whole(self) -> bool:
        return self._all(self._live.model is not None)

    def _all(self, own: bool) -> bool:
        return self._ranks.all_agree(torch.tensor([float(own)], dtype=torch.float64))

    def keep_one(self, lr: float = math.inf) -> None:
        newer, older = self._newer, self._older
        if newer.step is not None and newer.lr > lr and older.step is not None:
            spoilt = newer.lr >= _FAR * older.lr and lr**2 < newer.lr * older.lr  # it was copied for its LR, far from which it is
            if spoilt or not self._passed_by:
                self._newer, self._older = older, newer
        self._passed_by = False
        self._older.free()

    def keep_best(self, step: int, level: float) -> None:
        self._swap()
        self.renew(step, level)
        self._swap()

    def put_back_best(self, step: int) -> Restored | None:
        self._swap()
        restored = self.put_back(step)
        if restored is None:
            self._swap()
        else:
            self.keep_best(restored.step, restored.level)
        return restored

    def _swap(self) -> None:
        self._newer, self._older = self._older, self._newer

    def put_back(self, step: int) -> Restored | None:
        if not self._all(self.held is not None and self._fits(step)):
            return None
        if not self._ranks.alone:  # a rank on which this fails must not go on beside those that went back
            left: list[str] | None = self._newer.restore()
        else:
            left = self._survived(step, Snapshot.restore)
        if left is None:
            return None
        assert self._newer.step is not None
        restored = Restored(self._newer.step, self._newer.level)
        self._tell(step, restored.step, left)
        self.lost(step)
        return restored

    def _fits(self, step: int) -> bool:
        """Whether no copy is held that cannot be put back into the run."""
        misfit = None if self.held is None else self._newer.misfit()
        if misfit is not None:
            self._log.once("snapshot", step, f"the copy of step {self.held} does not fit the run and is not put back: {misfit}")
        return misfit is None

    def _tell(self, step: int, back_at: int, left: list[str]) -> None:
        """What a copy that was put back could not mend, and who wants to know that it was."""
        if left:
            self._log.once("snapshot", step, f"the copy of step {back_at} does not know {_some(left)}: they stay as they are")
        if self._on_rollback is not None:
            try:
                self._on_rollback(back_at)
            except Exception as error:
                self._log.once("on_rollback", step, f"on_rollback({back_at}) has failed ({error!r}); the run goes on")

    def go_on(self, step: int, goes_back: bool) -> None:
        self.able = goes_back
        if not goes_back:
            self._leave()
        self._fits(step)

    def give_up(self) -> None:
        self.able = False
        self._leave()

    def _leave(self) -> None:
        """Give all copies back and, until the next, the claim on what they were of."""
        _CLAIMED.discard(self)
        self.free()

    def free(self) -> None:
        self._passed_by = False
        self._newer.free()
        self._older.free()

    def free_newer(self) -> None:
        self._newer.free()
        if self._older.step is None:
            self._leave()

    def state_dict(self) -> dict[str, Any] | None:
        if not self.able or self._newer.step is self._older.step is None:
            return None
        passed_by = {"passed_by": True} if self._passed_by else {}
        return {"newer": self._newer.state_dict(), "older": self._older.state_dict(), **passed_by}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._live.begin()
        newer, older = (None, None) if state is None else (state["newer"], state["older"])
        self._newer.load_state_dict(newer)
        self._older.load_state_dict(older)
        self._passed_by = state is not None and state.get("passed_by", False)

    def _survived(self, step: int, act: Callable[[Snapshot], _T]) -> _T | None:
        """`act` on the newer copy, if there still are any; None where that fails."""
        if not self.able or self.failed:
            return None
        try:
            return act(self._newer)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._log.once("snapshot", step, f"the run could not be copied ({reason}); it will not go back")
            if self._ranks.alone:
                self.give_up()
            else:  # the others, which have a copy, learn it before they could use it
                self.failed = True
                self._leave()
            return None


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' and others' if names[5:] else ''}"


_CLAIMED: Final[weakref.WeakSet[Rollback]] = weakref.WeakSet()
"""Those of all runs that may still go back."""


def _claim(rollback: Rollback) -> None:
    """Raise where two runs, each with an optimizer of its own, would put parts of one model back to different steps."""
    live = rollback._live
    changed = {id(t) for t in (*live.parameters().values(), *live.buffers().values())}
    trained = {id(p) for p in live.optimized()}
    for other in _CLAIMED:
        theirs = other._live
        shared = changed & {id(t) for t in (*theirs.parameters().values(), *theirs.buffers().values())}
        # A run that is begun anew trains what the one before it did.
        if shared and not trained & {id(p) for p in theirs.optimized()}:
            given = f"optimizer={type(live.optimizer).__name__}" if live.model is None else f"model={type(live.model).__name__}"
            raise ValueError(
                f"{given}: an AutoWU of another optimizer goes back with parts of what this one trains, to another step; "
                "give each as model= what its own optimizer trains, or pass rollback=False"
            )
    _CLAIMED.add(rollback)
