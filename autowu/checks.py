"""Pure: checks of arguments and losses, which give the value back or say what is wrong with it.

The errors name the argument, its value and what it may be: a TypeError for a wrong type, a ValueError for a wrong value.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = [
    "Check",
    "between",
    "count",
    "device",
    "flag",
    "fraction",
    "integer",
    "loss",
    "one_of",
    "optional",
    "positive",
    "process_group",
    "share",
]

Check: TypeAlias = Callable[[str, Any], Any]


def integer(name: str, value: Any) -> int:
    """An integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: must be an integer")
    return int(value)


def count(name: str, value: Any) -> int:
    """An integer, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: must be an integer, at least 1")
    if value < 1:
        raise ValueError(f"{name}={value!r}: must be at least 1")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False")
    return value


def between(allowed: str, is_allowed: Callable[[float], bool]) -> Check:
    """The check of a real number in a range; `allowed` says which."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}: must be a number {allowed}")
        if not is_allowed(float(value)):
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        return float(value)

    return check


fraction = between("above 0 and below 1", lambda value: 0 < value < 1)
share = between("above 0 and at most 1", lambda value: 0 < value <= 1)
positive = between("above 0 and finite", lambda value: 0 < value < math.inf)


def one_of(*choices: Any) -> Check:
    """The check of a value that must be one of several."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
        return value

    return check


def optional(check: Check) -> Check:
    """The check of a value that may be None as well."""
    return lambda name, value: None if value is None else check(name, value)


def device(name: str, value: Any) -> torch.device:
    """A torch device."""
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}={value!r}: must be a torch device or None ({error})") from None


def process_group(name: str, value: Any) -> ProcessGroup:
    """A process group that has this rank."""
    if not isinstance(value, ProcessGroup):
        raise TypeError(f"{name}={value!r}: must be a torch.distributed.ProcessGroup that has this rank, or None")
    if dist.get_rank(value) < 0:
        raise ValueError(f"{name}={value!r}: this rank is not in it; pass the group that it trains with, or None")
    return value


def loss(value: Any) -> float | Tensor:
    """One floating-point number, or a tensor of one."""
    if type(value) is float:  # as a rule
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"loss has shape {tuple(value.shape)}: pass the mean loss of the step, a tensor of one element")
        if not value.is_floating_point():
            raise TypeError(f"loss is a tensor of {value.dtype}: pass the training loss, a floating-point number")
        return value
    if isinstance(value, (float, np.floating)):
        return float(value)
    raise TypeError(f"loss={value!r}: pass the training loss of the step, a float or a tensor of one element")
