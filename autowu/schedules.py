"""LR as a function of the optimizer step: pure arithmetic on floats, no state.

A *step* is one optimizer step, counted from 0. `position` is a step on the warm-up's own axis and may be fractional, because the
minimum of a fitted curve lies between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

__all__ = [
    "COOLDOWNS",
    "COOLDOWN_TYPES",
    "STABLES",
    "STABLE_TYPES",
    "WARMUPS",
    "WARMUP_TYPES",
    "cooldown_factor",
    "decades",
    "stable_factor",
    "warmup_lr",
]

_TWO_SPEED_PACE: Final = 0.8
"""Pace at which the last three quarters of a "two_speed" warm-up pass through the decades of LR, in that of an even one."""

WARMUPS: Final[dict[str, Callable[[float, float, float], float]]] = {
    "exp": lambda u, low, high: low * (high / low) ** u,
    "two_speed": lambda u, low, high: low * (high / low) ** (2 * _TWO_SPEED_PACE * u if u < 0.25 else 0.2 + _TWO_SPEED_PACE * u),
    "linear": lambda u, low, high: low + (high - low) * u,
}

# Decades of LR in a warm-up that kept the pace of its end, over those that it passes through.
_PACES: Final = {"exp": 1.0, "two_speed": _TWO_SPEED_PACE}

STABLES: Final[dict[str, Callable[[float], float]]] = {
    "constant": lambda u: 1.0,
    "inverse_sqrt": lambda u: 1.0 / math.sqrt(max(1.0, u)),
}

COOLDOWNS: Final[dict[str, Callable[[float], float]]] = {
    "cosine": lambda u: (1.0 + math.cos(math.pi * u)) / 2.0,
    "half_cosine": lambda u: math.cos(math.pi * u / 2.0),
    "linear": lambda u: 1.0 - u,
    "sqrt": lambda u: 1.0 - math.sqrt(u),
}

WARMUP_TYPES: Final = tuple(WARMUPS)
"""Of :func:`warmup_lr`."""
STABLE_TYPES: Final = tuple(STABLES)
"""Of :func:`stable_factor`."""
COOLDOWN_TYPES: Final = tuple(COOLDOWNS)
"""Of :func:`cooldown_factor`."""


def warmup_lr(
    position: float,
    warmup_steps: int,
    min_lr: float,
    max_lr: float,
    warmup_type: str = "exp",
) -> float:
    r"""LR at `position` of a warm-up that would reach `max_lr` after `warmup_steps` steps.

    With :math:`u = \text{position} / \text{warmup\_steps}`:

    - ``"exp"``: :math:`\text{min\_lr} \cdot (\text{max\_lr} / \text{min\_lr})^u` (Kim et al. 2021, section 3.1);
    - ``"two_speed"``: the same with :math:`1.6 u` in place of u in the first quarter and :math:`0.2 + 0.8 u` after it: the first
      40 % of the decades, where little is learnt, at twice the pace of the rest;
    - ``"linear"``: :math:`\text{min\_lr} + (\text{max\_lr} - \text{min\_lr}) \cdot u`.

    Args:
        position: where on the warm-up, in steps, 0 to `warmup_steps`.
        warmup_steps: length of the warm-up, in steps, at least 1.
        min_lr: LR of step 0, above 0.
        max_lr: LR of step `warmup_steps`, above `min_lr`.
        warmup_type: one of :data:`WARMUP_TYPES`.

    Example:
        >>> [round(warmup_lr(k, 4, 1e-4, 1.0), 6) for k in range(5)]
        [0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    return WARMUPS[warmup_type](position / warmup_steps, min_lr, max_lr)


def decades(min_lr: float, max_lr: float, warmup_type: str = "exp") -> float:
    """Decades of LR that a warm-up would pass through at the pace of its end; 0 for a linear one, which has no such pace.

    Example:
        >>> round(decades(1e-4, 1.0), 6), round(decades(1e-4, 1.0, "two_speed"), 6)
        (4.0, 3.2)
    """
    return _PACES.get(warmup_type, 0.0) * math.log10(max_lr / min_lr)


def stable_factor(age: float, stable_type: str = "constant") -> float:
    r"""Factor on the peak LR between the warm-up and the cooldown.

    With :math:`u` for `age`: ``"constant"`` 1; ``"inverse_sqrt"`` :math:`\min(1, 1 / \sqrt u)`.

    Args:
        age: steps since the warm-up began over the length of a run that such a warm-up belongs to, 0 or more.
        stable_type: one of :data:`STABLE_TYPES`.

    Example:
        >>> [stable_factor(u, "inverse_sqrt") for u in (0.5, 1.0, 4.0, 100.0)]
        [1.0, 1.0, 0.5, 0.1]
    """
    return STABLES[stable_type](age)


def cooldown_factor(progress: float, cooldown_type: str = "cosine") -> float:
    r"""Factor on the peak LR after the share `progress` of the cooldown, 0 to 1.

    With :math:`u` for `progress`: ``"cosine"`` :math:`(1 + \cos \pi u) / 2`; ``"half_cosine"`` :math:`\cos(\pi u / 2)`, a quarter
    wave; ``"linear"`` :math:`1 - u`; ``"sqrt"`` :math:`1 - \sqrt u`, which Hägele et al. 2024 (arXiv 2405.18392) found best for
    constant-then-cooldown schedules. Each falls strictly from 1 at 0 to 0 at 1.

    Example:
        >>> [round(cooldown_factor(u, "linear"), 2) for u in (0.0, 0.25, 1.0)]
        [1.0, 0.75, 0.0]
    """
    return COOLDOWNS[cooldown_type](progress)
