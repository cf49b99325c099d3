"""From the posterior of the loss curve to the decision: is the minimum past, and where is it? Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from autowu.gp import CurvePosterior, FloatArray

__all__ = [
    "SwitchDecision",
    "decide",
    "far_edge",
    "minimum_interval",
    "probability_past_minimum",
    "rise_contrast",
    "rise_share",
    "valley_contrast",
]

MIN_LOSSES = 10
"""With fewer finite losses a test has no vote: one can draw any curve through a handful of points."""
MIN_FALL = 1.0
"""Standard deviations that a curve must have fallen to its minimum: less is the noise of a curve that only rises."""
SURE: Final = 4.0
"""Standard deviations of a rise alone, at least: where the fall is small, the noise of a plateau is a good part of it."""
EARLY: Final = 0.28
"""Share of the planned warm-up in which a valley may be one period of a wave, as the order of the data makes them."""
STANDS: Final = 0.3
"""Share of the planned warm-up for which such a valley must stand: a wave falls again by then."""
_WAVE: Final = 1.25
"""Times a rise from such a valley that the curve has come back from, that a later one must amount to."""
_INTO: Final = 0.25
"""Share of that rise by which the curve must have fallen into the valley: noise before a first rise is none."""


@dataclass(frozen=True)
class SwitchDecision:
    """Outcome of one test.

    Attributes:
        switch: whether `patience` tests in a row have voted that the minimum is past.
        votes: number of such votes in a row, this one included.
        probability: probability that the minimum is past: the median over the subsamples, in [0, 1].
        minima: position of the minimum of the posterior mean, for each subsample, as a fraction of the planned warm-up.
        edges: of the far edge of the valley that the minimum lies in, likewise: the peak LR follows from it.
    """

    switch: bool
    votes: int
    probability: float
    minima: tuple[float, ...]
    edges: tuple[float, ...]


def probability_past_minimum(posterior: CurvePosterior) -> FloatArray:
    r"""For each of the S fits, the largest probability over the grid that the curve was lower before than it is now.

    :math:`\max_{x < K} P(f(x) < f(K))` (Kim et al. 2021, section 3.2), shape (S,), each in [0, 1]: the probability that one
    of two jointly normal values is below the other is :math:`\Phi(\mathrm{mean} / \mathrm{std})` of their difference.
    """
    rise = posterior.mean[:, -1:] - posterior.mean[:, :-1]
    spread = np.sqrt(posterior.difference_variance[:, :-1])
    z = _ratio(rise, spread)
    return np.array([0.5 * math.erfc(-row.max() / math.sqrt(2)) for row in z])


def valley_contrast(posterior: CurvePosterior) -> FloatArray:
    """How clearly the curve falls to its minimum and rises from it, in standard deviations, for each of the S fits, shape (S,).

    The largest fall to the minimum plus the rise from it to now, each over the standard deviation that the two points would have if
    they were independent. Noise on a flat curve makes shallow valleys, and the probability alone now and then takes one for a
    minimum.
    """
    lowest = posterior.mean.argmin(1)[:, None]
    depth = posterior.mean - np.take_along_axis(posterior.mean, lowest, 1)
    spread = np.sqrt(posterior.variance + np.take_along_axis(posterior.variance, lowest, 1))
    heights = _ratio(depth, spread)
    before = np.arange(len(posterior.grid)) <= lowest
    return np.asarray(np.where(before, heights, 0.0).max(1) + heights[:, -1])


def _valley(fit: CurvePosterior) -> CurvePosterior | None:
    """The part of one fit, S = 1, whose minimum counts; None where the curve does not fall before it rises.

    That is all of it, but for a curve that is lowest at its start and rises first, as where a queue fills. There it is what follows
    the top from which the curve falls to its lowest point after a fall.
    """
    mean, variance = fit.mean[0], fit.variance[0]
    top, fallen = _fallen(mean, variance)
    if fallen[mean.argmin()]:
        return fit
    if not fallen.any():
        return None
    begin = top[np.where(fallen, mean, np.inf).argmin()]
    curves = {name: getattr(fit, name)[:, begin:] for name in ("mean", "variance", "difference_variance")}
    return replace(fit, grid=fit.grid[begin:], **curves)


def _fallen(mean: FloatArray, variance: FloatArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """For each point of a curve where the highest before it lies, and whether it is lower by a standard deviation, both (K,)."""
    highest = np.maximum.accumulate(mean)
    top = np.maximum.accumulate(np.where(mean == highest, np.arange(len(mean)), 0))
    return top, _ratio(highest - mean, np.sqrt(variance + variance[top])) > MIN_FALL


def _valleys(posterior: CurvePosterior) -> tuple[list[CurvePosterior], float]:
    """The part that counts of each fit, all of it where there is no valley, and the median contrast."""
    fits = _single_fits(posterior)
    valleys = [_valley(fit) for fit in fits]
    contrast = float(np.median([0.0 if valley is None else valley_contrast(valley)[0] for valley in valleys]))
    return [valley or fit for valley, fit in zip(valleys, fits, strict=True)], contrast


def rise_share(fit: CurvePosterior) -> float:
    """How far one fit, S = 1, has risen from its minimum, as a share of its largest fall to it; infinite where it never fell."""
    mean = fit.mean[0]
    lowest = mean.argmin()
    fall, rise = mean[: lowest + 1].max() - mean[lowest], mean[-1] - mean[lowest]
    return float(rise / fall) if fall > 0 else math.inf


def rise_contrast(fit: CurvePosterior) -> float:
    """How clearly one fit, S = 1, has risen from its minimum, in the standard deviations of :func:`valley_contrast`."""
    mean, variance = fit.mean[0], fit.variance[0]
    lowest = mean.argmin()
    return float(_ratio(mean[-1:] - mean[lowest], np.sqrt(variance[-1:] + variance[lowest]))[0])


def lost_rise(fit: CurvePosterior) -> float:
    """The largest rise of one fit, S = 1, from an early valley that it has come back from, in units of the loss; 0 for none.

    A curve that rises first may have been lowest at its start: there the valleys of a wave are those after its first top.
    """
    mean, variance = fit.mean[0], fit.variance[0]
    top, fallen = _fallen(mean, variance)
    begin = top[fallen.argmax()] if fallen.any() else 0
    mean, grid = mean[begin:], fit.grid[begin:]
    places = np.arange(len(mean))
    lowest = np.minimum.accumulate(mean)
    at = np.maximum.accumulate(np.where(mean == lowest, places, 0))
    into = np.maximum.accumulate(mean)[at] - lowest
    come_back = mean - np.minimum.accumulate(mean[::-1])[::-1]
    rise = np.minimum(mean - lowest, come_back)
    return float(np.where((into >= _INTO * rise) & (grid[at] < EARLY), rise, 0.0).max())


def _stands(fit: CurvePosterior) -> bool:
    """Whether the valley of one fit, S = 1, is none of a wave, as far as can be told."""
    mean = fit.mean[0]
    lowest = mean.argmin()
    waited = fit.grid[lowest] >= EARLY or fit.grid[-1] - fit.grid[lowest] >= STANDS
    return bool(waited and mean[-1] - mean[lowest] >= _WAVE * lost_rise(fit))


def far_edge(fit: CurvePosterior, reach: float = math.inf) -> float:
    """The last position at which one fit, S = 1, is no higher than its minimum by a standard deviation, `reach` past it at most.

    In a flat valley the lowest point is anywhere, by noise; where the curve leaves the valley is known. The standard deviation is
    the one that the two points would have if they were independent, as in :func:`valley_contrast`.
    """
    mean, variance = fit.mean[0], fit.variance[0]
    lowest = mean.argmin()
    edge = fit.grid[np.flatnonzero(mean - mean[lowest] <= np.sqrt(variance + variance[lowest]))[-1]]
    return float(min(edge, fit.grid[lowest] + reach))


def minimum_interval(posterior: CurvePosterior, minimum: float, deviations: float = 1.96) -> tuple[float, float]:
    """Between which positions the minimum may lie: all about `minimum` at which the curve is no higher, within 95 %.

    The standard deviation is that of :func:`far_edge`, of the first of the fits.
    """
    mean, variance = posterior.mean[0], np.maximum(posterior.variance[0], 0)
    lowest = int(np.abs(posterior.grid - minimum).argmin())
    higher = np.flatnonzero(mean - mean[lowest] > deviations * np.sqrt(variance + variance[lowest]))
    before, after = higher[higher < lowest], higher[higher > lowest]
    low = before[-1] + 1 if len(before) else 0
    high = after[0] - 1 if len(after) else len(mean) - 1
    return float(posterior.grid[low]), float(posterior.grid[high])


def _single_fits(posterior: CurvePosterior) -> list[CurvePosterior]:
    """Each of the S fits as one of its own."""
    curves = ("mean", "variance", "difference_variance")
    return [replace(posterior, **{name: getattr(posterior, name)[k, None] for name in curves}) for k in range(len(posterior.mean))]


def _ratio(difference: FloatArray, spread: FloatArray) -> FloatArray:
    """`difference / spread`; where nothing is uncertain, the sign of the difference times infinity."""
    certain = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.asarray(np.divide(difference, spread, out=certain, where=spread > 0))


def decide(
    posterior: CurvePosterior,
    votes: int,
    *,
    confidence: float,
    patience: int,
    min_contrast: float = 0.0,
    min_rise: float = 0.0,
    reach: float = math.inf,
    waves: bool = False,
    silent: bool = False,
) -> SwitchDecision:
    """Count the vote of one test.

    Args:
        posterior: the fit to all losses so far.
        votes: votes in a row before this test.
        confidence: a subsample finds the minimum past where its probability exceeds this, in (0.5, 1).
        patience: votes in a row that make a switch, at least 1.
        min_contrast: a subsample finds the minimum past only where :func:`valley_contrast` exceeds this as well, 0 or more. Unless
            0, the curve must have fallen; where it rises first, its minimum is looked for after that.
        min_rise: share of its largest fall by which the curve must have risen from its minimum, 0 or more: less is a first dip, or
            noise on a plateau. Unless 0, that rise must also be :data:`SURE`, and what counts of a valley is its far edge.
        reach: how far past the minimum that edge is looked for, as a fraction of the planned warm-up.
        waves: whether a valley in the first quarter of the warm-up may be one of a wave. It has a vote once it has stood for a
            third, and a rise that the curve has come back from is no rise.
        silent: whether losses came since the test before and none was finite: a run that has blown up is past its best.

    The test votes "past" where most subsamples do: where the medians exceed `confidence`, `min_contrast`, `min_rise` and
    :data:`SURE`.

    Example:
        >>> import numpy as np
        >>> mean, variance = np.array([[2.0, 1.0, 3.0]]), np.array([[0.1, 0.1, 0.0]])
        >>> rising = CurvePosterior(np.linspace(0, 1, 3), 1.0, mean, np.ones((1, 3)), variance, num_losses=50)
        >>> decision = decide(rising, votes=2, confidence=0.95, patience=3)
        >>> decision.switch, decision.minima, decision.edges
        (True, (0.5,), (0.5,))
    """
    enough = posterior.num_losses >= MIN_LOSSES
    fits, contrast = _valleys(posterior) if min_contrast and enough else (_single_fits(posterior), 0.0)
    probability = float(np.median([probability_past_minimum(fit)[0] for fit in fits]))
    past = probability > confidence and (min_contrast == 0 or contrast > min_contrast)
    if min_rise:
        past = past and float(np.median([rise_share(fit) for fit in fits])) > min_rise
        past = past and float(np.median([rise_contrast(fit) for fit in fits])) > SURE
    past = past and (not waves or 2 * sum(_stands(fit) for fit in fits) > len(fits))
    if silent:
        probability, past = 1.0, True
    past = past and enough
    votes = votes + 1 if past else 0
    minima = tuple(float(fit.grid[fit.mean[0].argmin()]) for fit in fits)
    edges = tuple(far_edge(fit, reach) for fit in fits) if min_rise else minima
    return SwitchDecision(votes >= patience, votes, probability, minima, edges)
