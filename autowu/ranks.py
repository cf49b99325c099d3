"""Edge: the ranks that train together. Of one rank every verb is the identity.

A default process group may start after the scheduler was built, so each verb asks anew. A rank that stops calling is left to the
group's own timeout. All verbs but `exchange` rely on nothing but that a sum over the ranks has the same bits on all of them, as
ring and tree reductions give it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autowu.history import MISSING

__all__ = ["Heard", "Ranks"]

T = TypeVar("T")


class Heard(NamedTuple):
    """What an exchange told this rank."""

    missing: int
    """How many of the losses of all ranks were not finite; 0 where there is one rank."""
    words: list[float]
    """What the first rank said, empty for nothing."""
    sound: bool
    """Whether the weights of all ranks are finite."""
    flagged: bool
    """Whether a rank has raised its flag."""


class Ranks:
    """The ranks of `group`, None for the default group where there is one.

    Attributes:
        compared: whether it is known that all were given the same arguments.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.compared = False

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group) if _started() else 1

    @property
    def alone(self) -> bool:
        """Whether there is one rank."""
        return not _AVAILABLE or dist.group.WORLD is None or dist.get_world_size(self.group) == 1

    @property
    def number(self) -> int:
        """This rank's own, from 0."""
        return dist.get_rank(self.group) if _started() else 0

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.number == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks, on a device that the group's backend works on; one collective."""
        if self.alone:
            return values
        values = values.to(_device(values.device, self.group), copy=True)
        dist.all_reduce(values, group=self.group)
        return values

    def compare(self, described: Mapping[str, Any]) -> None:
        """Learn whether all ranks describe themselves in the same words; one collective, of the same size whatever they say.

        Raises:
            ValueError: on all ranks alike if they do not, naming what differs and the values.
        """
        digest = hashlib.sha256(repr(sorted(described.items())).encode()).digest()
        own = torch.tensor(list(digest), dtype=torch.float64)  # whole numbers, whose sums are exact
        total, squares = self.sum(torch.stack([own, own.square()])).cpu()
        if not torch.equal(total.square(), self.size * squares):  # numbers are alike where their mean square is their squared mean
            raise ValueError(self._differences(described))
        self.compared = True

    def _differences(self, described: Mapping[str, Any]) -> str:
        all_described: list[Mapping[str, Any]] = [{}] * self.size
        dist.all_gather_object(all_described, dict(described), group=self.group)
        told = []
        for name, value in all_described[0].items():
            other = next((rank for rank, of_rank in enumerate(all_described) if of_rank.get(name) != value), None)
            if other is not None:
                told.append(f"{name}={value!r} on rank 0, {all_described[other].get(name)!r} on rank {other}")
        return f"the ranks were given different arguments: {'; '.join(told)}; all must be given the same"

    def all_agree(self, yes: Tensor) -> bool:
        """Whether `yes`, (1,), is 1.0 on all ranks; one collective. Waits for the device."""
        return bool(self.sum(yes) == self.size)

    def of_first(self, value: T) -> T:
        """What the first rank has in place of `value`, which can be pickled; one collective or two."""
        if self.alone:
            return value
        held = [value]
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(held, src=first, group=self.group)
        return held[0]

    def average(self, losses: Tensor, flag: bool) -> Tensor:
        """The losses (n,) averaged over the ranks, and the number of ranks that raise the flag, (n + 1,); one collective.

        A mean is over the finite losses; where there is none, NaN, or MISSING if no rank had a loss at all.
        """
        raised = losses.new_full((1,), float(flag))
        packed = self.sum(torch.cat([*_summands(losses), raised]))
        return torch.cat([_means(packed[:-1].view(3, len(losses))), packed[-1:]])

    def exchange(self, losses: Tensor, words: Sequence[float] | None, width: int, sound: Tensor | None, flag: bool) -> Heard:
        """Average `losses`, in place, and learn what the others have to say; one collective.

        Args:
            losses: (n,) the last losses of this rank, n the same on all ranks; those not finite are left out of the mean, which is
                NaN where no rank has a finite one, MISSING where none has any.
            words: what this rank has to say, `width` numbers, or None; only the first rank is heard.
            width: how many numbers are said.
            sound: (1,) 1.0 where this rank's weights are finite, else 0.0; None where it does not matter.
            flag: whether this rank raises its flag.
        """
        if self.alone:
            return Heard(0, list(words or ()), sound is None or bool(sound), flag)
        own = losses.new_ones(1) if sound is None else sound.to(losses)
        spoken = [1.0, *words] if self.is_first and words is not None else [0.0] * (width + 1)
        n, summands = len(losses), _summands(losses)
        packed = self.sum(torch.cat([*summands, own, losses.new_tensor([float(flag), *spoken])]))
        sums = packed[: 3 * n].view(3, n)
        losses.copy_(_means(sums))
        number, are_sound, flags, given, *heard = torch.cat([sums[1].sum()[None], packed[3 * n :]]).tolist()
        return Heard(self.size * n - int(number), heard if given else [], are_sound == self.size, flags > 0)


def _summands(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the ranks sum of their losses: those that are finite, how many these are, how many came and are not; (n,) each."""
    finite = losses.isfinite()
    blown = ~finite & (losses != MISSING)
    return torch.where(finite, losses, 0.0), finite.to(losses), blown.to(losses)


def _means(sums: Tensor) -> Tensor:
    """The mean losses (n,) of the sums (3, n) of :func:`_summands`: NaN where none was finite, MISSING where none came."""
    total, finite, blown = sums
    return torch.where(finite > 0, total / finite, torch.where(blown > 0, math.nan, MISSING))


_AVAILABLE: Final = dist.is_available()


def _started() -> bool:
    return _AVAILABLE and dist.group.WORLD is not None  # as dist.is_initialized says, in half the time


def _device(device: torch.device, group: ProcessGroup | None) -> torch.device:
    """`device` if the group's backend works on it, else one on which it does."""
    able = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if device.type in able:
        return device
    if "cuda" in able:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(able[0])
