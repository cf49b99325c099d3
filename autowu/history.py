"""The losses of a run, kept on the device where they are made."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autowu.gp import LossCurve

__all__ = ["MISSING", "LossHistory"]

MISSING = -math.inf
"""Stands for a loss that did not come; left out as those that are not finite are, but no sign that the run has blown up."""

_STAGE = 1024
_MOST_SLOTS = 16_384


class LossHistory:
    """One loss per optimizer step, appended without a host synchronisation and reduced to at most `max_points` points.

    Losses are copied one by one into a small staging buffer on their device. :meth:`curve` (or a full buffer) folds them into bins
    of equal width: their sum, their squares, their count. When the bins run out they are merged in pairs, so that memory and the
    cost of a test stop growing with the run; until then a bin holds one loss and nothing is averaged. Squares are kept of the
    difference to the median of the first losses, so that a large constant in the loss costs no precision.

    The buffers live on the device of the first loss that is on an accelerator, in float64 (float32 on MPS, which has no other).

    Args:
        max_points: number of bins at most, an even number; None keeps every loss in a bin of its own.
        stage: number of losses, at least, that can be staged, and still be changed, before they are folded.
    """

    def __init__(self, max_points: int | None = 2048, stage: int = 0) -> None:
        self.max_points = max_points
        self.steps: int = 0
        """Number of losses appended, the missing ones included."""
        self.on_host: bool = True
        """Whether reading the losses waits for no device."""
        self._width = 1
        self._folded = 0
        self._stage_in(torch.empty(max(stage, _STAGE), dtype=torch.float64))
        # Rows: sums, squares, counts.
        self._bins = torch.zeros(3, max_points or _STAGE, dtype=torch.float64)
        self._anchor = torch.tensor(torch.nan, dtype=torch.float64)
        self._blown = torch.tensor(False)

    def _stage_in(self, room: Tensor) -> None:
        self._staged, self._room = room, len(room)
        # On a device an index costs a quarter of the copy, but so many views take their time.
        self._slots = () if room.is_cpu or len(room) > _MOST_SLOTS else room.unbind()
        # A view of memory assigns a number many times faster than torch does.
        self._array: Any = room.numpy().data if room.is_cpu else None
        self.on_host = room.is_cpu

    @property
    def device(self) -> torch.device:
        return self._staged.device

    def append(self, loss: float | Tensor) -> None:
        """Append the loss of one optimizer step: a float or a tensor of one element; :data:`MISSING` where there was none."""
        slot = self.steps - self._folded
        if slot == self._room:
            self.fold()
            slot = 0
        if self._array is not None and type(loss) is float:
            self._array[slot] = loss
        else:
            self._append_tensor(slot, loss)
        self.steps += 1

    def _append_tensor(self, slot: int, loss: float | Tensor) -> None:
        """Put a loss that is a tensor, or that goes where one was, without a synchronisation."""
        if isinstance(loss, Tensor) and not loss.is_cpu and self._array is not None:
            self._move(loss.device)
        room = self._slots[slot] if self._slots else self._staged[slot]
        if isinstance(loss, Tensor):
            room.copy_(loss.detach() if loss.ndim == 0 else loss.detach().view(()))
        else:
            room.fill_(loss)

    @property
    def staged(self) -> Tensor:
        """The losses that have not been folded yet, (k,), a view that may be written to."""
        return self._staged[: self.steps - self._folded]

    def last(self, count: int) -> Tensor:
        """The last `count` losses, on their device; fewer where there are no more, or some were merged with others.

        NaN stands for one that has been folded and was not finite.
        """
        staged = self.staged[max(0, len(self.staged) - count) :]
        if self._width > 1 or len(staged) == count:
            return staged
        sums, _, counts = self._bins[:, max(0, self._folded + len(staged) - count) : self._folded]
        return torch.cat([sums / counts + self._anchor, staged])

    @property
    def blown(self) -> bool:
        """Whether a loss that came, among those folded last, was not finite. Waits for their device."""
        return bool(self._blown)

    def curve(self, warmup_steps: int) -> LossCurve:
        """The losses so far as points of a warm-up of `warmup_steps` steps. No synchronisation."""
        self.fold()
        width, steps = self._width, self.steps
        num_bins = -(-steps // width)
        # A bin stands at the mean index of the steps in it; only the last may be part full.
        starts = torch.arange(num_bins, device=self.device, dtype=self._bins.dtype) * width
        last_index = (starts + (width - 1)).clamp_(max=steps - 1)
        sums, squares, counts = self._bins[:, :num_bins]
        return LossCurve(
            positions=(starts + last_index) / (2 * warmup_steps),
            sums=sums,
            squares=squares,
            counts=counts,
            anchor=self._anchor,
            end=steps / warmup_steps,
            resolution=width / warmup_steps,
        )

    def total(self) -> Tensor:
        """Sum and number of the finite losses so far, (2,), on their device."""
        self.fold()
        sums, _, counts = self._bins.sum(1)
        return torch.stack([sums + counts * self._anchor.nan_to_num(), counts])

    def mean(self) -> Tensor:
        """Mean of the finite losses so far, on their device, NaN where there is none. Leaves what is staged as it is."""
        sums, _, counts = self._bins.sum(1)
        finite = self.staged.isfinite()
        staged = torch.where(finite, self.staged, 0.0).sum()
        mean: Tensor = (sums + counts * self._anchor.nan_to_num() + staged) / (counts + finite.sum())
        return mean

    def fold(self) -> None:
        """Move the staged losses into the bins."""
        start, stop = self._folded, self.steps
        if start == stop:
            return
        while stop > self._width * self._bins.shape[1]:
            self._make_room()
        width = self._width
        values = self.staged
        finite = values.isfinite()
        self._blown = (~finite & (values != MISSING)).any()
        median = torch.where(finite, values, torch.nan).nanmedian()
        self._anchor = torch.where(self._anchor.isnan(), median, self._anchor)
        values = torch.where(finite, values - self._anchor, 0.0)

        first_bin, end_bin = start // width, -(-stop // width)
        rows = values.new_zeros(3, (end_bin - first_bin) * width)
        into = slice(start - first_bin * width, stop - first_bin * width)
        rows[0, into], rows[1, into], rows[2, into] = values, values.square(), finite
        self._bins[:, first_bin:end_bin] += rows.view(3, end_bin - first_bin, width).sum(2)
        self._folded = stop

    def _make_room(self) -> None:
        """Merge the bins in pairs, or, where every loss keeps its own, double their number."""
        empty = torch.zeros_like(self._bins)
        if self.max_points is None:
            self._bins = torch.cat([self._bins, empty], 1)
            return
        half = self.max_points // 2
        empty[:, :half] = self._bins.view(3, half, 2).sum(2)
        self._bins = empty
        self._width *= 2

    def _move(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        staged, self._bins, self._anchor = (
            t.to(device, dtype, non_blocking=True) for t in (self._staged, self._bins, self._anchor)
        )
        self._stage_in(staged)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_array", "_room", "_slots")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._stage_in(self._staged)  # a copy's array must be its own

    def state_dict(self) -> dict[str, Any]:
        """The history as plain numbers and one tensor, on the CPU so that it can be loaded anywhere.

        Folds nothing: saving must not change what the run goes on to compute.
        """
        num_bins = -(-self._folded // self._width)
        packed = torch.cat([self._anchor[None], self._bins[:, :num_bins].flatten(), self.staged]).cpu()
        return {
            "steps": self.steps,
            "folded": self._folded,
            "width": self._width,
            "max_points": self.max_points,
            "stage": len(self._staged),
            "losses": packed,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> LossHistory:
        """The history that a :meth:`state_dict` was taken of; it moves to the device of the next loss."""
        history = cls(state["max_points"], state["stage"])
        packed, history.steps = state["losses"], state["steps"]
        history._folded, history._width = state["folded"], state["width"]
        num_bins = -(-history._folded // history._width)
        while num_bins > history._bins.shape[1]:
            history._bins = torch.cat([history._bins, torch.zeros_like(history._bins)], 1)
        history._move(packed.device)
        history._anchor = packed[0].clone()
        history._bins[:, :num_bins] = packed[1 : 1 + 3 * num_bins].view(3, num_bins)
        history.staged.copy_(packed[1 + 3 * num_bins :])
        return history
