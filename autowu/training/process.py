"""This process among those of a distributed run."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autowu.training.config import UsageError

__all__ = ["Process", "join"]

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """Rank, number of processes and device; a run without a launcher is rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over the processes, in place. No host synchronisation with NCCL."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Mean of `value` over the processes, in place."""
        return self.sum(value).div_(self.world_size)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of their ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives on the main process, which alone does it; if it raises a UsageError, all processes do."""
        result: Any = None
        error: UsageError | None = None
        if self.is_main:
            try:
                result = action()
            except UsageError as raised:
                error = raised
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


@contextmanager
def join(device: str | None) -> Iterator[Process]:
    """Join the processes that torchrun or torch.distributed.launch started: NCCL on GPUs, gloo on CPUs.

    Raises:
        UsageError: if a GPU was asked for and there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device(device)
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"--device cuda: process {local_rank} of this machine has none of its {torch.cuda.device_count()} GPUs"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if world_size == 1:
        yield Process(0, 1, place)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), world_size, place)
        # Leave together, and with no model that still holds the group: gloo's threads abort a process that goes before them.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()
