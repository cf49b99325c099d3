"""Pure but for what it has counted: a second look at the peak LR, after the switch.

From a copy of the run the LR grows, as in a warm-up, until the loss rises; then the copy is put back. Where that takes far more
than the peak LR, the warm-up took a first dip, or a plateau, for the minimum, and the peak is raised. That the loss falls faster is
not asked for: in the few steps that a run can pay for it does not, even where the peak is an eighth of the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import Tensor

from autowu.config import Config
from autowu.phases import RampPlan, State, base_lr, peak_lrs, phase_at
from autowu.watch import HUGE, IN_A_ROW, STANDARD_ERROR

__all__ = ["MOST_RAMPS", "NEIGHBOURS", "SPAN", "Ramp", "is_smooth", "next_ramp"]

SHORTEST: Final = 900
"""Steps of a run that makes a ramp, at least: in a shorter one it costs more than it finds."""
MOST_RAMPS: Final = 4
"""Of a run; the first that finds the peak LR right is the last."""
SPAN: Final = 64.0
"""By which the LR would grow in a whole ramp: its pace. Those of earlier versions went so far."""
_SHARE: Final = 0.02
"""Of a run's steps, those in which the LR would grow so far."""
_ROOT: Final = 1.8
"""On the root of the run's steps, the most that it takes in a longer one, as a warm-up does."""
_LEAST: Final = 64
"""Such steps at least: at momentum 0.9 the loss is nine steps behind."""
_PARTS: Final = 16
"""Of these steps, whose mean losses are looked at."""
_SURE: Final = 3.0
"""Standard errors by which the losses of a part must lie above the level before, to be high."""
_BLIND: Final = 1.0
"""Of a run's progress: noise in which a part may lose so much, and not be high, hides an edge; of half of it one may be seen."""
_SMOOTH: Final = 1.45
"""Mean square of what losses two steps apart differ by, trend apart, over that of neighbours: 1 of noise, 2 of a running mean."""
_TREND: Final = 16
"""Differences whose mean is the trend amid them."""
NEIGHBOURS: Final = 128
"""Losses before a ramp that are compared so."""
_FAR: Final = 10.0
"""Times the peak LR, below which an edge is where it is expected."""
_WITHIN: Final = 5.0
"""The edge over the peak LR that it leads to: as much as is usual, so that a peak that is raised is none too high."""
_MOST: Final = 4.0
"""Times that a ramp raises the peak LR, at most; the next one says whether it may be more."""
_END: Final = _MOST * _WITHIN
"""Times the peak LR at which a ramp ends, at most: what lies beyond changes nothing."""


def next_ramp(config: Config, state: State, step: int) -> RampPlan | None:
    """The ramp that may begin at `step`, which is in the stable phase; None for none.

    There is one after every quarter of a full warm-up. Where the cooldown begins does not matter, as runs that differ in that alone
    are one run until then; it ends a ramp. None has the LR grow above `max_lr`, and there is none in a run whose peak was lowered:
    what is too high is known there.
    """
    switch = state.switch
    if switch is None or state.ramps >= MOST_RAMPS or not _asks(config) or state.setbacks or state.plateau_factor < 1:
        return None
    total = config.total_steps or 0
    whole = max(_LEAST, round(min(_SHARE * total, _ROOT * math.sqrt(total))))
    every = max(config.warmup_steps // 4, whole)
    if step < switch.step + (state.ramps + 1) * every or phase_at(config, state, step) != "stable":
        return None
    highest, peaks = [config.max_lr, *(high for _, high, _ in config.others)], peak_lrs(state)
    span = min(_END, *(high / lr for high, lr in zip(highest, peaks, strict=True)))
    if span < _FAR or base_lr(config, state, step) < peaks[0]:  # an LR that has fallen is far below its edge
        return None
    return RampPlan(step, math.ceil(whole * math.log(span) / math.log(SPAN)), span)


def is_smooth(losses: Tensor) -> bool:
    """Whether losses, (n,), are those of a running mean, which rises too late for a ramp. Waits for the device."""
    steps = losses.double()[losses.isfinite()].diff()
    if len(steps) < 2 * _TREND:
        return False
    trend = steps.unfold(0, _TREND, 1).mean(1)
    left = steps[_TREND // 2 :][: len(trend)] - trend
    return bool((left[1:] + left[:-1]).square().mean() > _SMOOTH * left.square().mean())


def _asks(config: Config) -> bool:
    """Whether a run looks at its peak again: one that is long, or open, and whose LR nothing else is to change."""
    long = config.total_steps is None or config.total_steps >= SHORTEST
    return long and config.min_rise > 0 and config.decay_phase_factor == 1.0 and not config.immediate_cooldown


class Ramp:
    """The losses of a ramp, as they come.

    Args:
        steps, span: of the :class:`~autowu.phases.RampPlan`.
        level, noise: exponential mean of the losses before it, as of a :class:`~autowu.watch.LossWatch`, and the variance of one.
        careful: whether one part that lies above the level is a rise, and not two in a row.

    Attributes:
        edge: times the peak LR at which the loss has risen; that of the end where it did not, None as long as it is not known.
        risen: whether it has.
    """

    def __init__(self, steps: int, span: float, level: float, noise: float, *, careful: bool = False) -> None:
        self.steps, self.span, self.level, self.noise, self.careful = steps, span, level, noise, careful
        self.edge: float | None = None
        self.risen = False
        self._seen = self._told = self._low = self._high = self._silent = self._count = 0
        self._sum, self._last = 0.0, math.nan

    @property
    def part(self) -> int:
        """Steps whose mean loss is one that is looked at."""
        return max(1, round(self.steps * math.log(SPAN) / math.log(self.span)) // _PARTS)

    def is_blind(self, progress: float, ramps: int) -> bool:
        """Whether noise would hide an edge of a run that has made so much progress; after other `ramps` it must tell more."""
        return self._least(self.part) > (_BLIND / 2 if ramps else _BLIND) * progress

    def _least(self, count: int) -> float:
        """By which the mean of so many losses must lie above the level, to be high."""
        return _SURE * math.sqrt(self.noise * (1 / count + STANDARD_ERROR**2))

    def follow(self, losses: Iterable[float]) -> None:
        """Take the losses of some steps, one after the other; -inf stands for one that is missing."""
        for loss in losses:
            if self.edge is None:
                self._push(loss)

    def _push(self, loss: float) -> None:
        self._seen += 1
        if -HUGE < loss < HUGE:
            self._told += loss != self._last
            self._silent, self._count, self._sum, self._last = 0, self._count + 1, self._sum + loss, loss
        elif loss != -math.inf:
            self._silent += 1
        if self._silent >= IN_A_ROW:
            self._end(self._seen - IN_A_ROW, risen=True)
        elif self._seen % self.part == 0 and self._count:
            if self._sum / self._count > self.level + self._least(self._count):
                self._high += 1
            else:
                self._low, self._high = self._seen, 0
            self._count, self._sum = 0, 0.0
            if self._high == (1 if self.careful else 2):
                self._end(self._low + self.part / 2, risen=True)
        if self.edge is None and self._seen >= self.steps:
            self._end(self.steps, risen=False)

    def _end(self, at: float, *, risen: bool) -> None:
        self.edge, self.risen = float(self.span ** (at / self.steps)), risen

    @property
    def factor(self) -> float:
        """By which the peak LR is to be raised, 1 for not at all. Losses that are missing or passed again are no evidence."""
        if self.edge is None or self.edge < _FAR or 2 * self._told < self._seen:
            return 1.0
        return min(_MOST, self.edge / _WITHIN)

    @property
    def burst(self) -> bool:
        """Whether its last loss was not finite."""
        return self._silent > 0

    def state_dict(self) -> dict[str, Any]:
        return {name.lstrip("_"): value for name, value in vars(self).items()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Ramp:
        """The ramp that :meth:`state_dict` was taken of."""
        ramp = cls(*(state[name] for name in ("steps", "span", "level", "noise")))
        for name in vars(ramp):
            setattr(ramp, name, state.get(name.lstrip("_"), getattr(ramp, name)))  # earlier versions knew no care
        return ramp
