"""This process among those of a distributed run."""

from __future__ import annotations

import gc
import os
import secrets
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from autowu.training.batches import processes_of_run
from autowu.training.config import RunError, UsageError

__all__ = ["Process", "join"]

T = TypeVar("T")
_FAILED = "autowu/failed"
_GONE = "another process is gone; go on from the last checkpoint with --resume, as torchrun --max-restarts does by itself"


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
def join(device: str | None, *, group: bool = False) -> Iterator[Process]:
    """Join the processes that torchrun or torch.distributed.launch started: NCCL on GPUs, gloo on CPUs.

    A UsageError or RunError within is printed, by one process where several have the same. With `group` one alone is a group too.

    Raises:
        UsageError: if a GPU was asked for and there is none, or the environment is not that of a launcher.
        RunError: if another process has failed, is gone, or cannot be reached.
    """
    world_size, rank = processes_of_run(), 0
    store: Any = None
    try:
        if world_size > 1:
            store, rank = _meet(world_size)
        place = _device(device)
        if world_size > 1:
            store = _of_this_start(store, rank, world_size)
        if world_size > 1 or group:
            _start_group(place, store, rank, world_size)
        yield Process(rank, world_size, place)
        if world_size > 1:
            # Leave together, and with no model that still holds the group: gloo's threads abort a process that goes before them.
            gc.collect()
            dist.barrier()
    except (UsageError, RunError) as error:
        if _is_first(store, str(error)):
            print(f"train.py: error: {f'rank {rank}: ' * (store is not None)}{error}", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        if _has_failed(store):  # the group breaks where one process leaves it
            raise RunError(f"another process has failed: {error}") from None
        if store is None or not _breaks_group(error):
            raise
        if _is_first(store, _GONE):
            print(f"train.py: error: rank {rank}: {_GONE} ({_in_short(error)})", file=sys.stderr, flush=True)
        raise RunError(_GONE) from None
    finally:
        if dist.is_initialized() and (world_size > 1 or group):
            dist.destroy_process_group()


def _meet(world_size: int) -> tuple[Any, int]:
    """The store of all processes, and the rank of this one, as the launcher's variables say."""
    try:
        store, rank, _ = next(rendezvous("env://"))
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK is {rank}")
    except ValueError as error:  # one that is missing, or no number
        reason = str(error).rsplit("rendezvous: ", 1)[-1]
        raise UsageError(f"WORLD_SIZE={world_size}: {reason}; start by torchrun, or unset WORLD_SIZE for one process") from None
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"the processes cannot meet at {place}: {_in_short(error)}") from None
    return store, rank


def _start_group(place: torch.device, store: Any, rank: int, world_size: int) -> None:
    store = dist.HashStore() if store is None else store  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU")
    if name == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(f"--device cuda: process {local_rank} of this machine has none of its {torch.cuda.device_count()} GPUs")
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def _breaks_group(error: Exception) -> bool:
    """Whether it is what a collective raises where a process no longer answers."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _in_short(error: Exception) -> str:
    return textwrap.shorten(str(error), 160)


def _of_this_start(store: Any, rank: int, world_size: int) -> Any:
    """The part of `store` that is of this start of the processes alone. They agree on its name, which is never used again.

    torchrun's store outlives its processes. Those that it starts anew would find the addresses of those that are gone.
    """
    if rank == 0:
        name, until = secrets.token_hex(8), time.monotonic() + store.timeout.total_seconds()
        while (came := store.add(f"autowu/came/{name}", 0)) < world_size - 1:
            if time.monotonic() > until:
                raise RunError(f"{came + 1} of {world_size} processes have come together in {store.timeout.total_seconds():.0f} s")
            for other in range(1, world_size):
                if store.check([f"autowu/asks/{other}"]):  # what is asked may be of an earlier start, and then nobody hears
                    store.set(f"autowu/answer/{store.get(f'autowu/asks/{other}').decode()}", name)
            time.sleep(0.01)
    else:
        own = secrets.token_hex(8)
        store.set(f"autowu/asks/{rank}", own)
        name = store.get(f"autowu/answer/{own}").decode()
        store.add(f"autowu/came/{name}", 1)
    return dist.PrefixStore(f"autowu/{name}", store)  # type: ignore[attr-defined]


def _is_first(store: Any, error: str) -> bool:
    """Whether no other process has had this error. Others learn that this one has failed."""
    if store is None:
        return True
    try:
        store.set(_FAILED, "1")
        return bool(store.add(f"autowu/{error}", 1) == 1)
    except RuntimeError:  # the store has gone with its process
        return True


def _has_failed(store: Any) -> bool:
    """Whether another process has failed with an error that it has printed."""
    try:
        return store is not None and bool(store.check([_FAILED]))
    except RuntimeError:
        return False
