"""Ranges of the optimizers' arguments, with the words in which one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

__all__ = ["ABOVE_0", "ABOVE_0_OR_INF", "AT_LEAST_0", "BELOW_1", "BETAS", "FINITE", "FLAG", "Range", "check"]


class Range(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], Any]
    words: str
    error: type[Exception] = ValueError


AT_LEAST_0: Final = Range(lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
ABOVE_0: Final = Range(lambda value: 0 < value < math.inf, "must be above 0 and finite")
ABOVE_0_OR_INF: Final = Range(lambda value: value > 0, "must be above 0")
FINITE: Final = Range(math.isfinite, "must be finite")
BELOW_1: Final = Range(lambda value: 0 <= value < 1, "must be in [0, 1)")
BETAS: Final = Range(lambda values: all(0 <= value < 1 for value in values), "must both be in [0, 1)")
FLAG: Final = Range(lambda value: isinstance(value, bool), "must be True or False", TypeError)


def check(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> None:
    """Raise for a value that is out of its range; what is not there is not looked at.

    Example:
        >>> check({"lr": AT_LEAST_0}, {"lr": -1.0})
        Traceback (most recent call last):
        ...
        ValueError: lr=-1.0: must be at least 0 and finite
    """
    for name, range_ in ranges.items():
        if name in values and not range_.holds(values[name]):
            raise range_.error(f"{name}={values[name]!r}: {range_.words}")
