"""The order of the training images, and the random numbers that each of them is augmented with.

Both depend on the seed, the epoch and the place in the order alone: not on the number of processes or of loader processes, nor on
where a run was cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info

from autowu.training.process import Process

__all__ = ["Augmented", "Draw", "Draws", "drawing"]


class Draw(NamedTuple):
    """An image that is drawn: what its random numbers depend on, and its number among the images."""

    seed: int
    epoch: int
    place: int
    image: int


class Draws(Sampler[Draw]):
    """This process's share of the images of an epoch, in random order, without those that do not fill a round of the processes.

    Args:
        size: number of images.
        process: this process among those that share them.
        seed: of the order.
        repeats: how often in a row an image is drawn; an epoch draws as many as without, of as many fewer images (Hoffer et al.
            2020, arXiv 1901.09335). Neighbours in the order go to different processes.
    """

    def __init__(self, size: int, process: Process, seed: int, repeats: int = 1) -> None:
        self._size, self._process, self._seed, self._repeats = size, process, seed, max(1, repeats)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size // self._process.world_size

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._size, generator=generator).repeat_interleave(self._repeats)
        for place in range(self._process.rank, len(self) * self._process.world_size, self._process.world_size):
            yield Draw(self._seed, self._epoch, place, int(order[place]))


class Augmented(Dataset[Any]):
    """Batches of images, each augmented by random numbers of its own, then mixed.

    Args:
        images: pairs of an image and its label.
        mix: (images, labels) of a batch to mixed images and soft labels; None leaves them.
        batch_size: images that are mixed with one another, of the several batches that a step may take.
    """

    def __init__(self, images: Any, mix: Callable[..., Any] | None, batch_size: int) -> None:
        self._images, self._mix, self._batch_size = images, mix, batch_size

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        images, labels = default_collate([self._augmented(draw) for draw in draws])
        if self._mix is None:
            return images, labels
        parts = []
        for first in range(0, len(draws), self._batch_size):
            with drawing(*draws[first][:3], 1):
                parts.append(self._mix(*(x[first : first + self._batch_size] for x in (images, labels))))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _augmented(self, draw: Draw) -> Any:
        with drawing(*draw[:3]):
            return self._images[draw.image]


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Random numbers within depend on `key` alone, those of torch, Python and NumPy; outside a loader process none is lost."""
    own = get_worker_info() is not None
    before = None if own else (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002 - what timm draws from
    first, second, third = np.random.SeedSequence(key).generate_state(3)
    torch.default_generator.manual_seed(int(first))
    random.seed(int(second))
    np.random.seed(third)  # noqa: NPY002
    try:
        yield
    finally:
        if before is not None:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])  # noqa: NPY002
