"""One decision for all ranks of a process group: the losses are averaged, and the first rank's verdict goes to all.

Both travel in one collective. The losses of the interval that ends with a test and the verdict on all losses before that interval
are summed over the ranks in the same buffer; the first rank then judges the averaged losses, and its verdict travels with the next
interval's. A verdict therefore takes effect one test later than in a run of one process, at the same step and with the same bits
everywhere, however the ranks' arithmetic differs. A rank that stops calling is left to the group's own timeout.

The watch over the run has a smaller collective of its own, more often: it relies on nothing but that a sum over the ranks has the
same bits on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autowu.history import MISSING

__all__ = ["LateRead", "average", "exchange", "rank_and_size", "sum_over_ranks"]


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """This process' rank in `group`, None for the default one, and the number of its ranks; (0, 1) in a run of one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of `values` over the ranks of `group`, on a device that its backend works on; one collective."""
    values = values.to(_device(values.device, group), copy=True)
    dist.all_reduce(values, group=group)
    return values


def average(losses: Tensor, flag: bool, group: ProcessGroup | None) -> Tensor:
    """The losses (n,) averaged over the ranks of `group`, and the number of ranks that raise the flag, (n + 1,); one collective.

    A mean is over the finite losses; where there is none, NaN, or MISSING if no rank had a loss at all.
    """
    finite = losses.isfinite()
    blown = ~finite & (losses != MISSING)
    packed = torch.cat([torch.where(finite, losses, 0.0), finite.to(losses), blown.to(losses), losses.new_tensor([float(flag)])])
    packed = sum_over_ranks(packed, group)
    sums, counts, blown_sums = packed[:-1].view(3, len(losses))
    silent = torch.where(blown_sums > 0, math.nan, MISSING)
    return torch.cat([torch.where(counts > 0, sums / counts, silent), packed[-1:]])


class LateRead:
    """A tensor on its way to the host; by the time it is wanted it has arrived, and nothing waits."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.to("cpu", copy=True)

    def get(self) -> list[float]:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values

    def __reduce__(self) -> tuple[type[LateRead], tuple[Tensor]]:
        return LateRead, (torch.tensor(self.get(), dtype=self._values.dtype),)


def exchange(
    losses: Tensor, verdict: Sequence[float] | None, width: int, sound: Tensor | None, group: ProcessGroup | None
) -> tuple[int, list[float], bool | None]:
    """Average `losses` over the ranks of `group`, in place, and learn the first rank's verdict; one collective.

    Args:
        losses: (n,) the last losses of this rank, n the same on all ranks; those not finite are left out of the mean, which is
            NaN where no rank has a finite one.
        verdict: what the first rank has to say, `width` numbers, or None; that of other ranks is not heard.
        width: length of a verdict.
        sound: (1,) 1.0 where this rank's weights are finite, NaN where they could not be copied, None where it does not matter.

    Returns:
        How many of the n losses of all ranks were not finite, the verdict, empty where there is none, and whether all ranks are
        sound, None where one could not copy.
    """
    rank, size = rank_and_size(group)
    heard = [1.0, *verdict] if rank == 0 and verdict is not None else [0.0] * (width + 1)
    finite = losses.isfinite()
    own = losses.new_ones(1) if sound is None else sound.to(losses)
    packed = torch.cat([torch.where(finite, losses, 0.0), finite.to(losses), own, losses.new_tensor(heard)])
    packed = sum_over_ranks(packed, group)
    n = len(losses)
    sums, counts = packed[: 2 * n].view(2, n)
    losses.copy_(sums / counts)  # 0 / 0 is NaN
    said: list[float]
    number, sane, given, *said = torch.cat([counts.sum()[None], packed[2 * n :]]).tolist()
    return size * n - int(number), said if given else [], None if math.isnan(sane) else sane == size


def _device(device: torch.device, group: ProcessGroup | None) -> torch.device:
    """`device` if the group's backend works on it, else one on which it does."""
    able = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if device.type in able:
        return device
    if "cuda" in able:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(able[0])
