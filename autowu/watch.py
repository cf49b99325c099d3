"""The watch over a run: has the loss blown up in the warm-up, has training come apart after the switch? Plain arithmetic on floats.

It asks how much has been lost of the progress made, which no factor on the loss and no constant added to it changes, and by how
many standard errors, so that noise alone is no divergence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from math import inf, sqrt
from typing import Any, Final

__all__ = ["BLOCK", "HUGE", "IN_A_ROW", "STANDARD_ERROR", "Leaps", "LossWatch", "Quiet"]

_START: Final = 10
"""Losses whose mean is where the run started."""
_DECAY: Final = 0.9
"""Of the exponential mean that stands for the loss now."""
_SLOW: Final = 1 - _DECAY
_QUICK: Final = 1 - 0.7
_NOISE_DECAY: Final = 0.95
_NOISE: Final = 1 - _NOISE_DECAY
STANDARD_ERROR: Final = math.sqrt((1 - _DECAY) / (1 + _DECAY))
"""Of the exponential mean, in standard deviations of one loss."""
HUGE: Final = 1e150
"""A loss from here on counts as not finite: the square of a difference would not be."""
_SETTLING: Final = 20
"""Losses after which the mean of a run that was not put back has caught up with it."""
_TRIAL: Final = 3
"""Losses after going back that tell whether the loss is what it was."""
_DOUBT: Final = 40
"""Losses after a halving without going back in which a run that had diverged finds back, or comes apart for good."""
_AT_ONCE: Final = 0.6
"""Share of a rise by which a loss falls at once that has changed back."""
_AGAIN: Final = 5
"""Equal losses in a row that are one, at least. A run with more, and more than twice as many as ever before, is stuck."""
_ALIKE: Final = 0.25
"""Share of its height by which a rise at once may differ from the one before, to be the same."""
_TOLERANCE: Final = 1.5
"""Times a change of the loss that a later rise must amount to, to be more than another such change."""
BLOCK: Final = 10
"""Losses that are read together, at most."""
_FADED: Final = math.sqrt(_NOISE_DECAY**BLOCK)
"""Share of the standard deviation that is left after a block, at least."""
IN_A_ROW: Final = 3
"""Losses that must be out of range, one after the other: a single bad batch is none."""
APART: Final = 1e6
"""Times 1 and all that is known of a run, by which a loss lies that no rise explains, not even one from the first step."""
LOST: Final = 0.3
"""Share of the progress that must be lost for a divergence."""
NEAR: Final = 0.1
"""Share of the progress that may be lost in a run that is worth copying."""
SURE: Final = 10.0
"""Standard errors that the same must amount to."""
_SURE_OF_MEAN: Final = SURE * STANDARD_ERROR
NEAR_SURE: Final = 4.0
"""Standard errors that may be lost in a run that is worth copying."""


class Leaps:
    """High losses in a row: whether the first of them was so at once, as of sources that alternate, and has been before.

    Attributes:
        foot, bottom, middle: the loss before the last high ones, the lowest of these and their mean.
        plateau: height of the last rise that was an alarm, where it was at once; else 0.
        visits: such alarms in a row, of the same height.
        stayed: whether a loss on the weights of the copy was as high.
    """

    __slots__ = ("bottom", "foot", "middle", "plateau", "stayed", "visits")

    def __init__(self) -> None:
        self.foot = self.bottom = self.middle = self.plateau = 0.0
        self.visits = 0
        self.stayed = False

    def follow(self, loss: float, last: float, high: int) -> None:
        """Take a high loss, after `last` and so many other high ones."""
        if high == 0:
            self.foot = last
            self.bottom = self.middle = loss
        self.bottom = min(self.bottom, loss)
        self.middle += (loss - self.middle) / (high + 1)

    def height(self, high: int) -> float:
        """Of the last high losses, if there were enough, the first was one at once, and they stayed there; else 0."""
        height = self.middle - self.foot
        return height if high >= IN_A_ROW and self.bottom - self.foot > _AT_ONCE * height else 0.0

    def is_again(self, height: float) -> bool:
        """Whether the last alarm was of this height."""
        return height > 0 and abs(height - self.plateau) <= _ALIKE * self.plateau

    def alarm(self, high: int) -> None:
        """The last losses, of which so many were high, are an alarm."""
        height = self.height(high)
        again = self.is_again(height)
        self.visits = self.visits + 1 if again else int(height > 0)
        self.plateau, self.stayed = height, self.stayed and again

    @property
    def known(self) -> bool:
        """Whether the last alarms were of a level that the loss leaps to and from, whatever the weights."""
        return self.visits > 1 and self.stayed


class Quiet:
    """Losses that let a run neither explode nor diverge."""

    __slots__ = ("far", "start", "sure")

    def __init__(self, start: float, far: float, sure: float) -> None:
        self.start, self.far, self.sure = start, far, sure

    def bound(self, low: float) -> float:
        """A loss at most this, and above -1e150, is one, in a block of which no loss is below `low`."""
        lost = LOST * (self.start - low)
        near = low + (lost if lost > self.sure else self.sure)
        return near if near < self.far else self.far


class LossWatch:
    """Follows the losses of a run one by one and says whether it has exploded or diverged.

    Attributes:
        start: mean of the first 10 finite losses.
        mean: exponential mean of the losses, decay 0.9, from `start`.
        best: lowest `mean` so far.
        level: exponential mean with decay 0.7: noisier, but it does not lag behind a steep fall.
        changed: whether neither going back nor a lower LR has brought the loss back: the loss has changed, not the weights. Since
            then all is measured anew. Whoever heeds it takes it down.
        halved: alarms that were none if it has.
        returned: what the loss was before it rose.
        rise: by how much it had risen from there.

    Equal losses in a row are one loss: a metric that is logged now and then is passed again in between. Those that are 0, or all
    losses so far, are what they are.
    """

    __slots__ = (
        *("above", "again", "apart", "before", "best", "calm", "changed", "count", "doubt", "fell", "halved", "high", "kept"),
        *("last", "leaps", "level", "longest", "lowest", "mean", "noise", "pace", "previous", "returned", "rise", "settling"),
        *("silent", "slack", "start", "trial"),
    )

    def __init__(self) -> None:
        self.count = 0
        self.start = self.mean = self.level = self.last = 0.0
        self.best = math.inf
        self.noise = 0.0  # variance of one loss about the curve, from the differences of neighbours
        self.calm = 0.0  # what it was at the best
        self.silent = 0  # losses in a row that were not finite
        self.above = 0  # losses in a row far above the start
        self.apart = 0  # of these, by orders of magnitude: a warm-up explodes by three, though its loss never fell
        self.high = 0  # losses in a row that would each be a divergence
        self.settling = 0  # losses until `best` is one again
        self.previous = inf  # the last loss that came; inf for one that was not finite
        self.again = 0  # times in a row that it has come
        self.longest = 0  # such times of any loss before it
        self.trial = 0  # losses to come that tell whether going back has brought the loss back
        self.doubt = 0  # losses to come that tell whether a lower LR has
        self.halved = 0
        self.pace = 0.0  # by how much the loss had fallen with each loss until it rose
        self.before = 0.0  # the loss before the last one, while in doubt
        self.fell = False  # whether the loss has fallen at once, as weights do not find back
        self.returned = 0.0  # what the loss was at the copy
        self.rise = 0.0  # by how much it had risen from there
        self.lowest = math.inf  # of the losses since
        self.changed = False
        self.slack = 0.0  # what must be lost, at least, in a run whose loss has changed before
        self.kept = 0.0  # progress made before it did
        self.leaps = Leaps()

    def push(self, loss: float) -> None:
        """Take the loss of one step; -inf stands for one that is missing and says nothing."""
        self.follow((loss,))

    def follow(self, losses: Iterable[float]) -> None:
        """Take the losses of some steps, one after the other."""
        rest = iter(losses)
        while (self.trial or self.doubt or self.count < _START) and (loss := next(rest, None)) is not None:
            if self.trial or self.doubt:
                self._try(loss)
            else:
                self._begin(loss)
        self._go_on(rest)

    def _try(self, loss: float) -> None:
        """Take one of the losses after an alarm that tell what it was worth."""
        before, last = self.count, self.last
        self._go_on((loss,))
        if self.silent >= IN_A_ROW:
            self.trial = self.doubt = 0  # which no change of the loss explains
        elif self.count == before:
            return
        elif self.trial:
            half = self.returned + max(self.rise, LOST * self.progress) / 2
            self.leaps.stayed = self.leaps.stayed or (self.trial == _TRIAL and loss > half)
            self.trial -= 1
            self.lowest = min(self.lowest, loss)
            if self.trial == 0 and (self.lowest > half or self.leaps.known):
                self.lowest = max(self.lowest, self.returned + self.leaps.plateau)
                self._measure_anew()
        else:
            height = max(self.rise, last - self.returned)
            if last - loss > _AT_ONCE * height and abs(last - self.before) < (1 - _AT_ONCE) / 1.3 * height:
                self.fell, self.rise = True, max(self.rise, (last + self.before) / 2 - self.returned)
            self.before = last
            self._doubt()

    def _doubt(self) -> None:
        """After a halving without going back: a run that had diverged finds back; a loss that has changed goes on as it is.

        So does one of sources that alternate: it may find back, but at once.
        """
        self.doubt -= 1
        if self.doubt >= _DOUBT // 2:  # the mean may be on its way yet
            self.lowest = self.mean
        self.rise = max(self.rise, self.mean - self.returned)
        fallen = min(self.pace * (_DOUBT - self.doubt), self.rise / 4)  # as it would have in any case
        if self.mean - self.returned < self.rise / 2 - fallen:
            self.doubt = 0
            if self.fell:
                self.lowest = self.returned + self.rise
                self._measure_anew()
        elif self.doubt == 0:
            risen, noise = self.mean - self.lowest, self._error(NEAR_SURE)
            self.lowest = self.mean
            least = -max(NEAR * self.rise, noise) - self.pace * _DOUBT / 2
            if least <= risen <= max(NEAR * self.rise / 4, noise):  # it has settled
                self._measure_anew()
            else:
                self.doubt = _DOUBT // 2

    def _measure_anew(self) -> None:
        """The loss is another one: its start and its noise are those of the losses to come."""
        self.changed = True
        self.slack = max(self.slack, _TOLERANCE * (self.lowest - self.returned))
        self.kept = self.progress
        self.mean = self.level = self.last
        self.start, self.noise, self.best = 0.0, 0.0, math.inf
        self.count = self.above = self.apart = self.high = self.settling = self.leaps.visits = 0

    def _follow_leap(self, loss: float, last: float, high: int, is_high: bool) -> int:
        """Follow high losses, or the one after them; how many there are in a row."""
        if is_high:
            self.leaps.follow(loss, last, high)
            return high + 1
        height = self.leaps.height(high)
        if height and not self.doubt and last - loss > _AT_ONCE * height:  # by itself, as weights do not
            self.slack = max(self.slack, (1 + _ALIKE) * height)
            if self.leaps.visits and not self.trial and self.leaps.is_again(height):  # those alarms were none either
                self.changed, self.halved, self.leaps.visits, self.rise = True, self.leaps.visits, 0, height
        return 0

    def _begin(self, loss: float) -> None:
        """Take one of the losses that say where the run starts."""
        if not -HUGE < loss < HUGE:
            if loss != -inf:
                self.silent += 1
                self._ends_run(inf, 0)
            return
        if self._comes_again(loss):
            return
        self.silent = 0
        self.count += 1
        self.start += (loss - self.start) / self.count
        self.mean = self.level = self.start
        if self.count > 1:
            self.noise += ((loss - self.last) ** 2 / 2 - self.noise) / (self.count - 1)
        self.last = loss
        if self.settling:
            self.settling -= 1
        if self.count == _START:
            self.best, self.calm = self.mean, self.noise
            self.start += self.kept

    def _comes_again(self, loss: float) -> bool:
        """Whether a finite loss is the one before, passed again."""
        if loss != self.previous or loss == 0:
            self._ends_run(loss, 1)
            return False
        self.again += 1
        return self.longest > 0 and self.again <= max(_AGAIN, 2 * self.longest)

    def _ends_run(self, previous: float, again: int) -> None:
        """A run of equal losses is over."""
        self.longest = max(self.longest, self.again)
        self.previous, self.again = previous, again

    def _go_on(self, losses: Iterable[float]) -> None:
        """Take later losses; every step of a run comes through here, so all is at hand in local variables."""
        start, best, mean, level, noise = self.start, self.best, self.mean, self.level, self.noise
        above, high, silent, settling, last, count = self.above, self.high, self.silent, self.settling, self.last, self.count
        slack, doubt, previous, again, calm = self.slack, self.doubt, self.previous, self.again, self.calm
        progress = self.progress
        lost, near = LOST * progress, NEAR * progress
        for loss in losses:
            if not -HUGE < loss < HUGE:
                if loss != -inf:
                    self._ends_run(inf, 0)
                    silent, previous, again = silent + 1, inf, 0
                continue
            if loss == previous or again != 1:
                self.previous = previous
                repeated, again = self._comes_again(loss), self.again
                if repeated:
                    continue
            previous, silent, count, far, taken = loss, 0, count + 1, False, loss
            if loss > start or loss > best + lost or high:  # else it is neither high nor far, however little noise there is
                error = sqrt(noise)
                sure = _SURE_OF_MEAN * error
                allowed = max(sure, lost, slack)
                if (is_high := loss > best + allowed) or high:
                    high = self._follow_leap(loss, last, high, is_high)
                    slack = self.slack
                far = loss > start + 2 * progress + SURE * error
                capped = best + IN_A_ROW * allowed  # so that one loss, however large, is no divergence
                taken = loss if loss < capped or settling or doubt else capped
            if far:
                above += 1
                self.apart = self.apart + 1 if loss > APART * (1 + abs(start) + progress + SURE * error) else 0
            elif above:
                above = self.apart = 0
            level += _QUICK * (loss - level)
            mean += _SLOW * (taken - mean)
            off = mean - best
            if not far and (off <= near or off <= _SURE_OF_MEAN * sqrt(noise)):  # what comes apart is no noise
                noise += _NOISE * ((loss - last) ** 2 / 2 - noise)
            last = loss
            if settling:
                settling -= 1
            elif off >= 0:
                continue
            best, calm = mean, noise
            progress = start - best if start > best else 0.0
            lost, near = LOST * progress, NEAR * progress
        self.best, self.mean, self.level, self.noise, self.calm, self.previous = best, mean, level, noise, calm, previous
        self.above, self.high, self.silent, self.settling, self.last, self.count = above, high, silent, settling, last, count

    def quiet(self) -> Quiet | None:
        """Which of the next :data:`BLOCK` losses may be taken later; None where none may."""
        if self.count < _START or self.settling or self.trial or self.doubt or (self.high and self.leaps.visits):
            return None
        error = _FADED * sqrt(self.noise)
        return Quiet(self.start, self.start + 2 * self.progress + SURE * error, _SURE_OF_MEAN * error)

    @property
    def progress(self) -> float:
        """How far the run has come down from its start, 0 or more."""
        return self.start - self.best if self.start > self.best else 0.0

    @property
    def exploded(self) -> bool:
        """Whether 3 losses in a row were not finite or, in a run that had come down, lay above its start by twice as much."""
        turned = self.silent >= IN_A_ROW and self.count > 0
        return turned or (self.above >= IN_A_ROW and self.progress > self._error(SURE))

    @property
    def diverged(self) -> bool:
        """Whether 3 losses in a row were not finite, or lost 30 % of the progress and 10 standard errors, as did their mean."""
        return self.silent >= IN_A_ROW or (self.high >= IN_A_ROW and self._lost > self._far_from_best)

    @property
    def near_best(self) -> bool:
        """Whether no more than 10 % of the progress, or 4 standard errors, are lost, and none by far: a run worth copying."""
        return self.silent == self.high == 0 and self._lost <= max(NEAR * self.progress, self._error(NEAR_SURE))

    @property
    def at_best(self) -> bool:
        """Whether the loss is as low as ever, but for 4 standard errors; else the run had come down, and has gone up since.

        What leaps up and falls again is noise by its differences; it counts up to twice the standard error at the best.
        """
        error = min(self._error(1), 2 * STANDARD_ERROR * math.sqrt(self.calm))
        return self._lost <= NEAR_SURE * error or self.progress <= SURE * error

    @property
    def _lost(self) -> float:
        return self.mean - self.best if self.count >= _START else 0.0

    @property
    def _far_from_best(self) -> float:
        return max(LOST * self.progress, self._error(SURE), self.slack)

    def _error(self, times: float) -> float:
        """So many standard errors of the exponential mean."""
        return times * STANDARD_ERROR * math.sqrt(self.noise)

    @property
    def on_trial(self) -> bool:
        """Whether it is still to be seen what the last alarm was worth."""
        return self.trial > 0 or self.doubt > 0

    def go_back(self, level: float | None = None, *, settling: int = _SETTLING, trial: bool = False) -> None:
        """The run was put back to where `level` was the one given; None where it goes on from here, for better or worse.

        In that case the next `settling` losses say where it stands. With `trial` that was because its loss had risen: where the
        losses to come do not come back half of the way, it is the loss that has changed.
        """
        again = self.doubt > 0  # the same rise goes on
        self.trial = self.doubt = 0
        if trial and self.silent < IN_A_ROW:
            self._begin_trial(level, again)
        self.silent = self.above = self.apart = self.high = 0
        if level is None:
            self.settling = settling
        else:
            self.mean = self.level = self.last = level
        # What the run reached on the way that it did not go is no measure of what it reaches now.
        self.best = self.mean if self.count >= _START else math.inf

    def _begin_trial(self, level: float | None, again: bool) -> None:
        if level is not None:
            self.leaps.alarm(self.high)
            self.trial, self.halved, self.returned = _TRIAL, max(1, self.leaps.visits), level
        elif again:
            self.doubt, self.halved = _DOUBT, self.halved + 1
        else:
            self.doubt, self.halved, self.returned = _DOUBT, 1, self.best
            self.pace = self.progress / self.count
            self.before, self.fell = self.last, False
        self.lowest, self.rise = math.inf, max(self.mean, self.level) - self.returned
        self.mean = max(self.mean, self.level)  # which lags behind

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self.__slots__ if name != "leaps"}
        return state | {name: getattr(self.leaps, name) for name in Leaps.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.leaps = Leaps()
        for name in self.state_dict():
            if name in state:  # else nothing was known of it
                setattr(self.leaps if name in Leaps.__slots__ else self, name, state[name])
        self.calm = state.get("calm", self.noise)
