"""Pure: checks of arguments and losses, which give the value back or say what is wrong with it.

The errors name the argument, its value and what it may be: a TypeError for a wrong type, a ValueError for a wrong value.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

__all__ = [
    "Check",
    "between",
    "count",
    "device",
    "flag",
    "fraction",
    "group_lrs",
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
        number = _float(value)
        if not is_allowed(number):
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        return number

    return check


def _float(value: Any) -> float:
    """A real number; an integer beyond all floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


fraction = between("above 0 and below 1", lambda value: 0 < value < 1)
share = between("above 0 and at most 1", lambda value: 0 < value <= 1)
_FLOAT32: Final = torch.finfo(torch.float32)
positive = between("above 0 and finite in float32", lambda value: _FLOAT32.smallest_normal <= value <= _FLOAT32.max)


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


def group_lrs(name: str, value: Optimizer) -> Optimizer:
    """An optimizer each of whose groups has an LR that a scheduler can set, and an initial one and a scale, where it has them."""
    for number, group in enumerate(value.param_groups):
        for key in ("lr", "initial_lr", "lr_scale"):
            if key == "lr" or key in group:
                _group_lr(f"{name}.param_groups[{number}][{key!r}]", group.get(key))
    return value


def _group_lr(name: str, value: Any) -> None:
    if value is None:
        raise TypeError(
            f"{name}=None: must be a number, at least 0 and finite, for AutoWU sets it; build the optimizer with an LR, "
            "and without one that it makes itself (transformers' Adafactor: lr=1e-3, relative_step=False)"
        )
    is_tensor = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
    if is_tensor and (value.is_meta or value.requires_grad):
        raise TypeError(f"{name}={value!r}: a tensor must have a value, and need no gradient, for AutoWU sets it")
    if not is_tensor and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}={value!r}: must be a number, or a floating-point tensor of one, at least 0 and finite")
    if not 0 <= _float(value) < math.inf:
        raise ValueError(f"{name}={value!r}: must be at least 0 and finite")


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
    """One floating-point number, or a tensor or array of one."""
    if type(value) is float:  # as a rule
        return value
    if isinstance(value, np.ndarray) and value.size == 1 and np.issubdtype(value.dtype, np.floating):
        return float(value.item())
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"loss has shape {tuple(value.shape)}: pass the mean loss of the step, a tensor of one element")
        if not value.is_floating_point():
            raise TypeError(f"loss is a tensor of {value.dtype}: pass the training loss, a floating-point number")
        return value
    if isinstance(value, (float, np.floating)):
        return float(value)
    wanted = "pass the training loss of the step, a float or a tensor of one element"
    raise TypeError(f"loss={reprlib.repr(value)}: {wanted}, and no {type(value).__name__}")
