"""State: the losses of a constant phase, and whether they have stopped improving."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from autowu.gp import NUM_START_POINTS, ClosedFormGP, CurvePosterior, LossCurve
from autowu.history import LossHistory
from autowu.ranks import Ranks
from autowu.watch import HUGE

__all__ = ["Plateau", "has_settled", "start_of"]

LITTLE: Final = 0.02
"""Share of all the progress of a run: a later half that has brought less was not worth its steps."""
FEWEST: Final = 100
"""Losses that it takes to tell."""
_POINTS: Final = 1024
_LENGTHSCALE: Final = 0.3
"""Of the curve, as a share of the constant phase: what comes and goes faster is noise."""


class Plateau:
    """The losses of a constant phase, at one peak LR.

    Attributes:
        peak: that LR.
    """

    def __init__(self, ranks: Ranks, peak: float) -> None:
        self.peak = peak
        self._ranks = ranks
        self._losses = LossHistory(_POINTS)

    def append(self, loss: float | Tensor) -> None:
        """Keep the loss of a step; waits for no device."""
        self._losses.append(loss)

    def is_due(self, warmup: int) -> bool:
        """Whether to ask :meth:`settled`: from as many losses on as the warm-up had, each time that there are 3 to 6 % more."""
        number = self._losses.steps
        return number >= max(warmup, FEWEST) and number % (1 << number.bit_length() - 5) == 0

    def settled(self, warmup: int, start: float | None, confidence: float) -> bool:
        """Whether the loss has stopped improving, on all ranks alike; two collectives, and one read of 16 KB.

        The first rank decides by the mean of the losses of all, in the later half of warm-up and constant phase together.
        """
        curve, answer = _mean_curve(self._losses, self._ranks), 0.0
        if self._ranks.is_first:
            with contextlib.suppress(Exception):  # nothing to fit is no evidence
                posterior = ClosedFormGP(_LENGTHSCALE).posterior(curve)
                answer = float(has_settled(curve, posterior, (1 - warmup / self._losses.steps) / 2, start, confidence))
        return bool(self._ranks.sum(torch.tensor([answer], dtype=torch.float64)).item())

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak, "losses": self._losses.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.peak, self._losses = state["peak"], LossHistory.from_state_dict(state["losses"])


def _mean_curve(losses: LossHistory, ranks: Ranks) -> LossCurve:
    """The losses of all ranks, on the host: each point is the mean of its losses, and counts once."""
    curve = losses.curve(losses.steps)
    own = torch.stack([curve.sums + curve.counts * curve.anchor.nan_to_num(), curve.counts])
    sums, counts = ranks.sum(own).cpu().double()
    seen = counts > 0
    means = torch.where(seen, sums / counts, torch.nan)
    anchor = means.nanmedian()
    points = torch.where(seen, means - anchor, 0.0)
    positions = curve.positions.cpu().double()
    return LossCurve(positions, points, points.square(), seen.double(), anchor, curve.end, curve.resolution)


def has_settled(curve: LossCurve, posterior: CurvePosterior, since: float, start: float | None, confidence: float) -> bool:
    """Whether with more than this probability the curve brought less than :data:`LITTLE` of all progress from `since` on.

    Progress is counted from a loss of `start`; where that is not known, from the beginning of the curve. So neither the scale of
    the loss nor a constant added to it matters.
    """
    mean, positions, means = posterior.mean[0], *curve.clipped().finite()
    later = means[positions >= since]
    # Where noise hides the curve the likeliest one is flat, and sure of it; means of a third each are not known better than this.
    least = float(later.var()) * 6 / len(later) if len(later) > 1 else math.inf
    half = int(np.searchsorted(posterior.grid, since))
    progress = abs((mean[0] if start is None else start) - mean[-1])
    margin = LITTLE * progress - (mean[half] - mean[-1])
    spread = max(float(posterior.difference_variance[0][half]), least, 1e-300)
    return bool(0.5 * math.erfc(-margin / math.sqrt(2 * spread)) > confidence)


def start_of(losses: LossHistory) -> float | None:
    """The loss that a run began at, as the median of its first; None where there is none, or a huge one. Waits for the device."""
    means = losses.curve(1).finite()[1][:NUM_START_POINTS]
    start = float(means.median()) if len(means) else math.inf
    return start if abs(start) < HUGE else None
