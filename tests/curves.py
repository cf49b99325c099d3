"""Loss curves for tests."""

import numpy as np

from autowu.history import LossHistory


def valley(n, noise=0.1, seed=0):
    """A warm-up of n losses: down from 2.3, lowest at 0.6, up again to about 1.5."""
    x = np.arange(n) / n
    return 0.9 + 1.4 * ((x - 0.6) / 0.6) ** 2 + noise * np.random.default_rng(seed).normal(size=n)


def curve_of(losses, warmup_steps=None, max_points=2048):
    """The losses as the curve of a warm-up of `warmup_steps`, or of their own length."""
    history = LossHistory(max_points)
    for loss in losses:
        history.append(float(loss))
    return history.curve(warmup_steps or len(losses))
