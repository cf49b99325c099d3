"""Pure: what a user gives to the scheduler, as it goes on with it, or the error that says what is wrong with it."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from autowu.distributed import rank_and_size
from autowu.gp import MIN_LENGTHSCALE, ClosedFormGP, LossCurveGP
from autowu.gpytorch_engine import GPyTorchGP
from autowu.phases import Config
from autowu.schedules import decades


def engine(gp: str | LossCurveGP, config: Config, seed: int) -> LossCurveGP:
    """The engine that is named, or the one that is given."""
    lengthscale = 0.2
    if span := decades(config.min_lr, config.max_lr, config.warmup_type):
        lengthscale = min(lengthscale, max(0.5 / span, MIN_LENGTHSCALE))  # half a decade
    if gp == "closed-form":
        return ClosedFormGP(lengthscale)
    if gp == "gpytorch":
        return GPyTorchGP(lengthscale=lengthscale, seed=seed)
    if isinstance(gp, str):
        raise ValueError(f"gp={gp!r}: must be 'closed-form', 'gpytorch' or an engine object")
    if not isinstance(gp, LossCurveGP):
        raise TypeError(f"gp={gp!r}: must be 'closed-form', 'gpytorch' or an object with posterior() and max_points")
    return gp


def seed(value: Any) -> int:
    """An integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"seed={value!r}: must be an integer")
    return int(value)


def device(name: str, value: Any) -> torch.device | None:
    """A torch device, or None."""
    try:
        return None if value is None else torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}={value!r}: must be a torch device or None ({error})") from None


def process_group(group: Any) -> ProcessGroup | None:
    """A process group that has this rank, or None."""
    if group is None:
        return None
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"process_group={group!r}: must be a torch.distributed.ProcessGroup that has this rank, or None")
    if rank_and_size(group)[0] < 0:
        raise ValueError(f"process_group={group!r}: this rank is not in it; pass the group that it trains with, or None")
    return group


def loss(value: Any) -> float | Tensor:
    """One floating-point number, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"loss has shape {tuple(value.shape)}: pass the mean loss of the step, a tensor of one element")
        if not value.is_floating_point():
            raise TypeError(f"loss is a tensor of {value.dtype}: pass the training loss, a floating-point number")
        return value
    if isinstance(value, (float, np.floating)):
        return float(value)
    raise TypeError(f"loss={value!r}: pass the training loss of the step, a float or a tensor of one element")
