"""State: losses on data that is not trained on, and whether the run is past the best of them.

Such a loss is that of weights whose LR is still high, so three in a row are averaged. Past the best is a run that has lost a tenth
of its progress, and more than noise would. No factor on the loss and no constant added to it changes that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from autowu.micro_batches import MicroBatches
from autowu.ranks import Ranks
from autowu.watch import HUGE

__all__ = ["AVERAGED", "MAX_LOWERINGS", "HeldOut"]

AVERAGED: Final = 3
"""Losses in a row whose mean is compared."""
_LOST: Final = 0.1
"""Share of the progress that must be lost."""
_SURE: Final = 6.0
"""Standard errors that the same must amount to, of the difference between two such means: the best of many is low by some."""
_ERROR: Final = math.sqrt(math.pi) / 2 * math.sqrt(2 / AVERAGED)
"""Of that difference: times the mean difference of neighbours, which is 2 / sqrt(pi) standard deviations of a loss."""
MAX_LOWERINGS: Final = 6
"""After so many, a sixty-fourth of the peak LR, the run is left alone."""


class HeldOut:
    """Follows the losses on held-out data from the switch on.

    Attributes:
        came: whether a loss was observed since the last was read; alike on all ranks.
        level: mean of the last three.
        best: lowest `level` of the stage.
        lowered: how often the peak LR was lowered.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._forget()

    def _forget(self) -> None:
        self._observed, self.came = MicroBatches(), False
        self.start = self.level = math.nan  # `start` is the first loss of the run
        self.begin()

    def begin(self) -> None:
        """A stage begins: what was best is known no longer, but for where the run started."""
        self.best = math.inf
        self._recent: list[float] = []
        self.lowered = 0
        self._noise, self._pairs = 0.0, 0  # mean difference of neighbours, and of how many

    def go_on(self, *, restored: bool) -> None:
        """The peak LR was lowered, where the best weights were put back or, without a copy, from here."""
        self.lowered += 1
        self.leave()
        if not restored:
            self.best = math.inf

    def leave(self) -> None:
        """The weights that the last losses were of are gone."""
        self._recent = []

    def observe(self, loss: float | Tensor) -> None:
        """Add a loss, or that of one batch of several, which :func:`autowu.checks.loss` has passed."""
        self._observed.observe(loss)
        self.came = True

    def read(self) -> float:
        """The mean over the ranks of what came, NaN where none of it is finite; one collective. Waits for the device."""
        self.came = False
        loss = float(self._observed.loss_of_step(None))
        finite = -HUGE < loss < HUGE
        total, number = self._ranks.sum(torch.tensor([loss if finite else 0.0, float(finite)], dtype=torch.float64)).tolist()
        return total / number if number else math.nan

    def begin_at(self, loss: float) -> None:
        """Take a loss that was read for that of the start, if none was before."""
        if math.isnan(self.start):
            self.start = loss

    def follow(self, loss: float) -> bool:
        """Take a finite loss that was read; whether the run has never been better."""
        self.begin_at(loss)
        if self._recent:
            self._pairs += 1
            self._noise += (abs(loss - self._recent[-1]) - self._noise) / self._pairs
        self._recent = [*self._recent, loss][-AVERAGED:]
        if len(self._recent) < AVERAGED:
            return False
        self.level = sum(self._recent) / AVERAGED
        if self.level >= self.best:
            return False
        self.best = self.level
        return True

    @property
    def is_past_best(self) -> bool:
        """Whether so much is lost of what was best that it is neither noise nor little."""
        if len(self._recent) < AVERAGED or self.lowered >= MAX_LOWERINGS:
            return False
        return self.level - self.best > max(_LOST * (self.start - self.best), _SURE * _ERROR * self._noise)

    def state_dict(self) -> dict[str, Any] | None:
        """None as long as nothing was observed."""
        if not self.came and math.isnan(self.start):
            return None
        kept = {"start": self.start, "best": self.best, "noise": self._noise, "pairs": self._pairs, "lowered": self.lowered}
        return kept | {"recent": list(self._recent), "came": self.came, "observed": self._observed.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self._forget()
        if state is None:
            return
        self.start, self.best, self.lowered = state["start"], state["best"], state["lowered"]
        self._noise, self._pairs, self._recent = state["noise"], state["pairs"], list(state["recent"])
        self.level = sum(self._recent) / len(self._recent) if self._recent else math.nan
        self.came = state["came"]
        self._observed.load_state_dict(state["observed"])
