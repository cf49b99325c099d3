"""The images of an experiment: scikit-learn's digits, or CIFAR-10, CIFAR-100, Tiny ImageNet or an image folder under a root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autowu.training.config import TrainConfig, UsageError, parse_args
from autowu.training.data import Data, Loaders, find_data, make_loaders
from autowu.training.process import Process

__all__ = ["Images", "name_of", "open_images"]

DIGITS_SIZE = 8
_CIFAR = {"cifar-10-batches-py": "torch/cifar10", "cifar-100-python": "torch/cifar100"}
_TINY = "tiny-imagenet-200"
_COLOURS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}


@dataclass(frozen=True)
class Images:
    """What is trained on, by the batch of this process.

    Attributes:
        name: "digits", "cifar10", "cifar100", or that of the folder.
        config: train.py's options of these images.
        data: their number, classes and channels.
        size: their side in pixels.
        process: this process.
    """

    name: str
    config: TrainConfig
    data: Data
    size: int
    process: Process

    def loaders(self, batch_size: int | None = None) -> Loaders:
        """Images and labels; `batch_size` on this process stands in for that of the experiment."""
        config = self.config if batch_size is None else replace(self.config, batch_size=batch_size)
        return make_loaders(config, self.process, self.data, self.size, _COLOURS)


def open_images(
    root: Path | None,
    process: Process,
    batch_size: int,
    seed: int,
    size: int | None = None,
    workers: int = 4,
    options: Sequence[str] = (),
) -> Images:
    """Look at the images under `root`, without loading them; None for the digits, which are 8 x 8.

    Args:
        root: with CIFAR's folder in it as torchvision unpacks it, or Tiny ImageNet's, or train/ and val/ of class folders.
        process: this process.
        batch_size: of a step on all processes.
        seed: of the order of the images, and of what they are augmented by.
        size: side that images of a root are brought to, in pixels; by default 32 for CIFAR and 64 for others.
        workers: loader processes.
        options: more of train.py's, of the augmentation for one.

    Raises:
        UsageError: if they are not there, or a batch is more than all of them or cannot be split over the processes.
    """
    name, where = _found(root)
    batch = ["--global-batch-size", str(batch_size), "--seed", str(seed), "--workers", str(workers)]
    config = parse_args([*where, *batch, *options])
    data = find_data(config, process)
    own = DIGITS_SIZE if root is None else size or (32 if data.small else 64)
    return Images(name, config, data, own, process)


def name_of(root: Path | None) -> str:
    """What `Images.name` will be.

    Raises:
        UsageError: if there is no such folder.
    """
    return _found(root)[0]


def _found(root: Path | None) -> tuple[str, list[str]]:
    """Its name, and train.py's options for what lies in a folder."""
    if root is None:
        return "digits", ["--dataset", "digits"]
    if not root.is_dir():
        raise UsageError(f"--data-root {root}: no such folder")
    for folder, dataset in _CIFAR.items():
        if (root / folder).is_dir():
            return dataset.removeprefix("torch/"), ["--dataset", dataset, "--data-dir", str(root)]
    inside = root / _TINY if (root / _TINY).is_dir() else root
    return inside.resolve().name, ["--dataset", "folder", "--data-dir", str(inside)]
