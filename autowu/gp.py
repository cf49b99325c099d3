"""The Gaussian process on the loss curve: losses in, a posterior over the noise-free curve out.

The default engine, :class:`ClosedFormGP`, needs no gradient descent. With the length-scale fixed, the covariance of the losses is
``outputscale * (R + rho * I)``, ``rho = noise / outputscale``. For a given `rho` the marginal likelihood is maximised by a
constant and an outputscale in closed form (generalised least squares), so the fit is a search over one number. `R` is smooth: a few
dozen features reproduce it to rounding, and every quantity follows from sums over the losses that have the size of the features.
Those sums are formed on the device of the losses and read by the host in one copy of a few kilobytes; the rest is arithmetic on
matrices of that size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "GRID_SIZE",
    "MIN_LENGTHSCALE",
    "NUM_START_POINTS",
    "ClosedFormGP",
    "CurvePosterior",
    "CurveSummary",
    "FittedGP",
    "LossCurve",
    "LossCurveGP",
    "features",
    "fit_closed_form",
    "summarize",
]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.floating[Any]]]  # as numpy.typing has it, which is slow to import

GRID_SIZE = 500
"""Points on which the posterior is evaluated (Kim et al. 2021 use 500 too)."""

NUM_START_POINTS = 10
"""Points whose median is taken for the loss that a run starts from."""

MIN_LENGTHSCALE = 0.02
"""Shortest length-scale of the closed form, as a fraction of the planned warm-up: below it the features grow in number."""

_LOG_RHO = np.linspace(math.log(1e-6), math.log(1e6), 121)
_RELATIVE_EIGENVALUE_FLOOR = 1e-11


@dataclass(frozen=True)
class LossCurve:
    """The losses of a warm-up, as points on the axis of the planned warm-up. All tensors are float64, on one device.

    A point is one loss, or, in a run too long to keep them one by one, a bin of successive losses. Losses that were not finite, or
    missing, count 0.

    Attributes:
        positions: (m,) centre of each point as a fraction of the planned warm-up, increasing, in [0, 1].
        sums: (m,) sum of the point's finite losses, less `anchor` each.
        squares: (m,) sum of the squares of the same.
        counts: (m,) number of finite losses in the point.
        anchor: () what is taken off every loss, a loss of the start; NaN as long as there is no finite one.
        end: position just after the last loss: that of the coming step, in (0, 1].
        resolution: distance between two points, so that a curve of single losses has 1 / (steps of the planned warm-up).
    """

    positions: Tensor
    sums: Tensor
    squares: Tensor
    counts: Tensor
    anchor: Tensor
    end: float
    resolution: float

    def finite(self) -> tuple[Tensor, Tensor]:
        """Positions and mean losses of the points that have any, both (k,). Synchronises with the device."""
        seen = self.counts > 0
        return self.positions[seen], self.sums[seen] / self.counts[seen] + self.anchor

    def clipped(self) -> LossCurve:
        """The curve with its highest points brought down to as far above its start as its lowest point lies below it.

        A run that explodes passes through losses of any size; above the start they say "past the minimum" and no more, and one
        of 1e30 would hide all the rest. The start is the median of the first 10 points that have a loss, or of all points where
        most lie higher still than that: a loss that rises first. A curve that never was below it stays as it is. No
        synchronisation.
        """
        means = self.sums / self.counts  # NaN where a point has no finite loss
        seen = self.counts > 0
        start = torch.where(seen & (seen.cumsum(0) <= NUM_START_POINTS), means, torch.nan).nanmedian()
        lowest = torch.where(means.isnan(), torch.inf, means).amin()
        cap = 2 * start - lowest
        middle = means.nanmedian()
        cap = torch.where(middle > cap, 2 * middle - lowest, cap)
        high = (means > cap) & (cap > lowest)
        return replace(
            self,
            sums=torch.where(high, cap * self.counts, self.sums),
            squares=torch.where(high, cap.square() * self.counts, self.squares),
        )

    def to(self, device: torch.device | str) -> LossCurve:
        """The same curve on another device."""
        names = ("positions", "sums", "squares", "counts", "anchor")
        return replace(self, **{n: getattr(self, n).to(device, torch.float64) for n in names})


@dataclass(frozen=True)
class CurvePosterior:
    """What a fit says of the noise-free loss curve f, on the host. S fits (subsamples; 1 for the closed form), G grid points.

    Attributes:
        grid: (G,) positions at which the curve is known, increasing from 0 to K.
        end: position one point after the last finite loss: now, unless the run has blown up or stopped reporting.
        mean: (S, G) posterior mean of f, in units of the loss.
        variance: (S, G) posterior variance of f.
        difference_variance: (S, G) posterior variance of ``f(K) - f(grid)``; 0 at K itself.
        num_losses: number of finite losses behind the fit.
    """

    grid: FloatArray
    end: float
    mean: FloatArray
    variance: FloatArray
    difference_variance: FloatArray
    num_losses: int


@runtime_checkable
class LossCurveGP(Protocol):
    """What `AutoWU(gp=...)` takes: anything that turns a curve into a posterior.

    An engine that carries state between fits also has ``state_dict()`` and ``load_state_dict(state)``; `AutoWU` saves and restores
    it. An engine may raise: the test is then counted as "no evidence to switch", reported once, and the run goes on.

    `max_points` is the number of points at most that the engine wants a curve reduced to, None for one point a loss.
    """

    max_points: int | None

    def posterior(self, curve: LossCurve) -> CurvePosterior:
        """Fit the curve. The arrays of the result are on the host."""
        ...


@dataclass(frozen=True)
class CurveSummary:
    """All that the closed form needs of a curve: sums over its n finite losses y (less the anchor) and their features phi (r).

    Attributes:
        gram: (r, r) sum of ``phi phi^T``.
        feature_losses: (r,) sum of ``phi y``.
        feature_sum: (r,) sum of ``phi``.
        count, loss_sum, loss_squares: n, sum of y, sum of ``y^2``.
        anchor: what was taken off every loss.
        last: position of the last finite loss.
    """

    gram: FloatArray
    feature_losses: FloatArray
    feature_sum: FloatArray
    count: float
    loss_sum: float
    loss_squares: float
    anchor: float
    last: float


@dataclass(frozen=True)
class FittedGP:
    """The maximum of the marginal likelihood over constant, outputscale and noise, and the posterior of the feature weights.

    The curve is ``constant + phi(x)^T rotation w``; a posteriori w is normal with mean `weights` and the diagonal covariance
    `weight_variance`.

    Attributes:
        constant: prior mean, in units of the loss.
        outputscale: prior variance of the curve, in squared units of the loss.
        noise: variance of one loss about the curve.
        log_likelihood: log marginal likelihood of the losses at these values.
        rotation: (r, r); weights: (r,); weight_variance: (r,).
    """

    constant: float
    outputscale: float
    noise: float
    log_likelihood: float
    rotation: FloatArray
    weights: FloatArray
    weight_variance: FloatArray


@lru_cache(maxsize=32)
def _basis(lengthscale: float) -> tuple[FloatArray, FloatArray]:
    """Nodes u (m,) on [0, 1] and map (m, r) such that ``k(x, u) @ map`` are features phi of the unit RBF kernel on [0, 1].

    Nystrom features on Chebyshev nodes: with ``k(u, u) = Q L Q^T``, ``phi(x) = k(x, u) Q L^(-1/2)``. The number of nodes keeps
    the largest error of ``phi(x)^T phi(x')`` below 1e-9 from the longest length-scales down to 0.02.
    """
    num_nodes = 12 + math.ceil(4.0 / lengthscale)
    nodes = (1 - np.cos(math.pi * (np.arange(num_nodes) + 0.5) / num_nodes)) / 2
    values, vectors = np.linalg.eigh(_rbf(nodes, nodes, lengthscale))
    kept = values > _RELATIVE_EIGENVALUE_FLOOR * values[-1]
    return nodes, vectors[:, kept] / np.sqrt(values[kept])


def _rbf(x: FloatArray, nodes: FloatArray, lengthscale: float) -> FloatArray:
    return np.asarray(np.exp(-0.5 * ((x[:, None] - nodes) / lengthscale) ** 2))


def features(positions: FloatArray, lengthscale: float) -> FloatArray:
    """Features (k, r) of positions (k,) in [0, 1], with ``features(x) @ features(x').T`` the unit RBF kernel to rounding."""
    nodes, node_map = _basis(lengthscale)
    return np.asarray(_rbf(positions, nodes, lengthscale) @ node_map)


def summarize(curve: LossCurve, lengthscale: float) -> CurveSummary:
    """Reduce a curve to its :class:`CurveSummary`: a few matrix products on the curve's device, then one read by the host."""
    nodes, node_map = (torch.from_numpy(a).to(curve.sums.device, non_blocking=True) for a in _basis(lengthscale))
    scaled = (curve.positions[:, None] - nodes).mul_(1 / lengthscale)
    phi = scaled.square_().mul_(-0.5).exp_() @ node_map
    r = phi.shape[1]
    # The columns of the right side ride in one product: r of the Gram matrix, one of the losses, one of ones.
    right = torch.cat([phi * curve.counts[:, None], curve.sums[:, None], curve.counts[:, None]], 1)
    last = torch.where(curve.counts > 0, curve.positions, -1.0).amax()
    totals = [curve.counts.sum(), curve.sums.sum(), curve.squares.sum(), curve.anchor, last]
    packed = torch.cat([(phi.T @ right).flatten(), torch.stack(totals)]).cpu().numpy()
    products = packed[: r * (r + 2)].reshape(r, r + 2)
    count, loss_sum, loss_squares, anchor, last_position = packed[r * (r + 2) :].tolist()
    return CurveSummary(
        gram=products[:, :r],
        feature_losses=products[:, r],
        feature_sum=products[:, r + 1],
        count=count,
        loss_sum=loss_sum,
        loss_squares=loss_squares,
        anchor=anchor,
        last=last_position,
    )


def fit_closed_form(summary: CurveSummary) -> FittedGP:
    """Maximise the marginal likelihood of a summarised curve (at least 2 losses that differ).

    The search runs over log rho on a grid of 121 values from 1e-6 to 1e6, refined by a parabola through the best three.

    Raises:
        ValueError: where the losses leave nothing to fit: fewer than 2, or all equal.
    """
    n, r = summary.count, len(summary.feature_sum)
    if n < 2:
        raise ValueError(f"{n:.0f} finite losses: a fit needs 2 or more")
    # Standardised losses: the fit, and with it every decision, is blind to the scale and the shift of the loss.
    center = summary.loss_sum / n
    variance = summary.loss_squares / n - center**2
    if not 0 < variance < math.inf:
        raise ValueError(f"losses of variance {variance:g}: nothing to fit")
    scale = math.sqrt(variance)

    eigenvalues, rotation = np.linalg.eigh(summary.gram)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    ones = rotation.T @ summary.feature_sum
    losses = (rotation.T @ summary.feature_losses - center * ones) / scale

    def profile(log_rho: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Log likelihood, constant and outputscale at their best for each of the (k,) values of log rho."""
        rho = np.exp(log_rho)
        damped = 1.0 / (eigenvalues + rho[:, None])
        # u^T (R + rho I)^-1 w for u, w among the ones and the standardised losses (whose plain products are n, 0, n).
        q_11 = (n - damped @ (ones * ones)) / rho
        q_1y = -(damped @ (ones * losses)) / rho
        q_yy = (n - damped @ (losses * losses)) / rho
        constant = q_1y / q_11
        outputscale = np.maximum(q_yy - constant * q_1y, np.finfo(np.float64).tiny) / n
        log_det = n * np.log(outputscale) - np.log(damped).sum(1) + (n - r) * log_rho
        return -0.5 * (log_det + n + n * math.log(2 * math.pi)), constant, outputscale

    likelihoods = profile(_LOG_RHO)[0]
    best = int(np.argmax(likelihoods))
    log_rho = float(_LOG_RHO[best])
    if 0 < best < len(_LOG_RHO) - 1:
        left, mid, right = likelihoods[best - 1 : best + 2]
        if (bend := left - 2 * mid + right) < 0:
            log_rho += 0.5 * (left - right) / bend * float(_LOG_RHO[1] - _LOG_RHO[0])
    log_likelihood, constant, outputscale = (float(a[0]) for a in profile(np.array([log_rho])))

    rho = math.exp(log_rho)
    damped = 1.0 / (eigenvalues + rho)
    return FittedGP(
        constant=summary.anchor + center + scale * constant,
        outputscale=outputscale * variance,
        noise=rho * outputscale * variance,
        log_likelihood=log_likelihood - n * math.log(scale),
        rotation=rotation,
        weights=scale * damped * (losses - constant * ones),
        weight_variance=outputscale * variance * rho * damped,
    )


class ClosedFormGP:
    """The loss-curve GP with its maximum-likelihood fit in closed form: all losses used, nothing drawn at random, no state.

    Prior: constant mean, RBF kernel of fixed `lengthscale`, Gaussian noise (Kim et al. 2021, section 3.2).

    Args:
        lengthscale: of the RBF kernel, as a fraction of the planned warm-up, 0.02 or more.

    Raises:
        ValueError: if `lengthscale` is out of range.

    Example:
        >>> from autowu.history import LossHistory
        >>> history = LossHistory()
        >>> for k in range(100):
        ...     history.append(abs(k - 60) / 100)
        >>> posterior = ClosedFormGP(lengthscale=0.1).posterior(history.curve(warmup_steps=100))
        >>> round(float(posterior.grid[posterior.mean[0].argmin()]), 2)
        0.6
    """

    max_points: int | None = 2048

    def __init__(self, lengthscale: float = 0.1) -> None:
        if not MIN_LENGTHSCALE <= lengthscale < math.inf:
            raise ValueError(f"lengthscale={lengthscale!r}: must be finite and at least {MIN_LENGTHSCALE}")
        self.lengthscale: float = lengthscale

    def posterior(self, curve: LossCurve) -> CurvePosterior:
        """Fit `curve`; one small device-to-host read.

        Raises:
            ValueError: if there are fewer than 2 finite losses, or all are equal.
        """
        summary = summarize(curve.clipped(), self.lengthscale)
        fit = fit_closed_form(summary)
        end = min(curve.end, summary.last + curve.resolution)
        grid = np.linspace(0.0, end, GRID_SIZE)
        phi = features(grid, self.lengthscale) @ fit.rotation
        return CurvePosterior(
            grid=grid,
            end=end,
            mean=(fit.constant + phi @ fit.weights)[None],
            variance=(phi**2 @ fit.weight_variance)[None],
            difference_variance=((phi[-1] - phi) ** 2 @ fit.weight_variance)[None],
            num_losses=round(summary.count),
        )

    def state_dict(self) -> dict[str, float]:
        """The length-scale: nothing else outlives a fit."""
        return {"lengthscale": self.lengthscale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self.lengthscale = state["lengthscale"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lengthscale={self.lengthscale:g})"
