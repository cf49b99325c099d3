"""From the posterior of the loss curve to the decision: is the minimum past, and where is it? Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autowu.gp import CurvePosterior, FloatArray

__all__ = ["SwitchDecision", "decide", "probability_past_minimum", "valley_contrast"]

MIN_LOSSES = 10
"""With fewer finite losses a test has no vote: one can draw any curve through a handful of points."""


@dataclass(frozen=True)
class SwitchDecision:
    """Outcome of one test.

    Attributes:
        switch: whether `patience` tests in a row have voted that the minimum is past.
        votes: number of such votes in a row, this one included.
        probability: probability that the minimum is past: the median over the subsamples, in [0, 1].
        minima: position of the minimum of the posterior mean, for each subsample, as a fraction of the planned warm-up.
    """

    switch: bool
    votes: int
    probability: float
    minima: tuple[float, ...]


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
    silent: bool = False,
) -> SwitchDecision:
    """Count the vote of one test.

    Args:
        posterior: the fit to all losses so far.
        votes: votes in a row before this test.
        confidence: a subsample finds the minimum past where its probability exceeds this, in (0.5, 1).
        patience: votes in a row that make a switch, at least 1.
        min_contrast: a subsample finds the minimum past only where :func:`valley_contrast` exceeds this as well, 0 or more.
        silent: whether losses came since the test before and none was finite. A run that has blown up is past the best that is
            known of it.

    The test votes "past" where most of the subsamples do: where the medians exceed `confidence` and `min_contrast`.

    Example:
        >>> import numpy as np
        >>> rising = CurvePosterior(
        ...     grid=np.linspace(0, 1, 3), end=1.0, mean=np.array([[2.0, 1.0, 3.0]]), variance=np.ones((1, 3)),
        ...     difference_variance=np.array([[0.1, 0.1, 0.0]]), num_losses=50)
        >>> decision = decide(rising, votes=2, confidence=0.95, patience=3)
        >>> decision.switch, decision.minima
        (True, (0.5,))
    """
    probability = float(np.median(probability_past_minimum(posterior)))
    past = probability > confidence and (min_contrast == 0 or float(np.median(valley_contrast(posterior))) > min_contrast)
    if silent:
        probability, past = 1.0, True
    past = past and posterior.num_losses >= MIN_LOSSES
    votes = votes + 1 if past else 0
    minima = tuple(posterior.grid[posterior.mean.argmin(1)].tolist())
    return SwitchDecision(votes >= patience, votes, probability, minima)
