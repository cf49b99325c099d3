"""Ranges of the optimizers' arguments, with the words in which one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    *("ABOVE_0", "ABOVE_0_OR_INF", "AT_LEAST_0", "BELOW_1", "BETAS", "FINITE", "FLAG", "FLAG_OR_NONE", "LARGEST", "LR", "STEP"),
    *("Range", "check"),
]

LARGEST: Final = torch.finfo(torch.float32).max
"""What torch takes for a float32 tensor; it raises in a step for a larger number that is finite."""


def _is_number(value: Any) -> bool:
    """Of a kind that torch's operations take."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_tensor(value: Any) -> bool:
    """Of one real floating-point number, with a value."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1 and not value.is_meta


class Range(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], Any]
    words: str
    is_kind: Callable[[Any], bool] = _is_number
    kind: str = "a number"


def _float(value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:  # an integer beyond all floats
        return math.nan


AT_LEAST_0: Final = Range(lambda value: 0 <= value <= LARGEST, "must be at least 0 and finite in float32")
ABOVE_0: Final = Range(lambda value: 0 < value <= LARGEST, "must be above 0 and finite in float32")
ABOVE_0_OR_INF: Final = Range(lambda value: 0 < value <= LARGEST or value == math.inf, "must be above 0")
FINITE: Final = Range(lambda value: -LARGEST <= value <= LARGEST, "must be finite in float32")
BELOW_1: Final = Range(lambda value: 0 <= value < 1, "must be in [0, 1)")
BETAS: Final = Range(
    lambda values: len(values) == 2 and all(0 <= _float(value) < 1 for value in values),
    "must both be in [0, 1), and two",
    lambda values: isinstance(values, (tuple, list)) and all(map(_is_number, values)),
    "a tuple of numbers",
)
FLAG: Final = Range(lambda value: True, "must be True or False", lambda value: isinstance(value, bool), "a bool")
FLAG_OR_NONE: Final = Range(
    lambda value: True, "must be True, False or None", lambda value: value is None or isinstance(value, bool), "a bool"
)
LR: Final = AT_LEAST_0._replace(
    is_kind=lambda value: _is_number(value) or _is_tensor(value), kind="a number or a floating-point tensor of one"
)
STEP: Final = AT_LEAST_0._replace(is_kind=_is_tensor, kind="a floating-point tensor of one number")


def check(ranges: Mapping[str, Range], values: Any) -> None:
    """Raise for a value of another kind, or out of its range; what is not there is not looked at.

    Raises:
        TypeError, ValueError: naming the argument, its value and what it may be.

    Example:
        >>> check({"lr": AT_LEAST_0}, {"lr": -1.0})
        Traceback (most recent call last):
        ...
        ValueError: lr=-1.0: must be at least 0 and finite in float32
    """
    if not isinstance(values, Mapping):
        return  # torch says what a group must be
    for name, range_ in ranges.items():
        if name not in values:
            continue
        value = values[name]
        if not range_.is_kind(value):
            raise TypeError(f"{name}={value!r}: not {range_.kind}; {range_.words}")
        if not range_.holds(_float(value) if _is_number(value) or isinstance(value, Tensor) else value):
            raise ValueError(f"{name}={value!r}: {range_.words}")
