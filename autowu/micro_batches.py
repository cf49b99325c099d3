"""State: the losses observed since the last optimizer step, and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autowu import checks
from autowu.history import MISSING

__all__ = ["MicroBatches"]


class MicroBatches:
    """Sums the losses of micro-batches, on the host or on the device of the first that is not there. Waits for no device."""

    def __init__(self) -> None:
        self._sum: float | Tensor = 0.0
        self._count = 0

    def observe(self, loss: float | Tensor) -> None:
        """Add the loss of one micro-batch, which :func:`autowu.checks.loss` has passed."""
        if isinstance(loss, Tensor):
            loss = loss.detach()
            if loss.device.type == "cpu":
                loss = loss.item()
            else:
                place = self._sum.device if isinstance(self._sum, Tensor) else loss.device
                dtype = torch.float32 if place.type == "mps" else torch.float64
                loss = loss.to(place, dtype, non_blocking=True).reshape(())
        self._sum = self._sum + loss
        self._count += 1

    def loss_of_step(self, loss: float | Tensor | None) -> float | Tensor:
        """The mean of what was observed and of `loss`, if any; MISSING where that is nothing. The next step begins anew.

        Raises:
            TypeError, ValueError: if `loss` is not one floating-point number.
        """
        if loss is not None:
            # As a rule it is a number, or a tensor of one on the host; all else is looked at closely.
            if type(loss) is Tensor and loss.is_cpu and loss.numel() == 1 and type(number := loss.item()) is float:
                loss = number
            elif type(loss) is not float:
                loss = _read(loss)
            if self._count == 0:
                return math.nan if type(loss) is float and loss == MISSING else loss  # not finite, but it did come
            self.observe(loss)
        if self._count == 0:
            return MISSING
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        return math.nan if type(mean) is float and mean == MISSING else mean

    def state_dict(self) -> dict[str, Any]:
        return {"sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count = state["sum"], state["count"]


def _read(loss: float | Tensor) -> float | Tensor:
    """A loss, checked; a number where it is on the host."""
    loss = checks.loss(loss)
    return loss.item() if isinstance(loss, Tensor) and loss.is_cpu else loss
