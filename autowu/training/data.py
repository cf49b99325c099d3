"""The data: scikit-learn's bundled digits, or a folder of images."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from autowu.training.config import RunError, TrainConfig, UsageError
from autowu.training.process import Process

__all__ = ["DIGITS_TEST_SIZE", "Data", "Loaders", "find_data", "make_loaders"]

DIGITS_TEST_SIZE = 450
"""A quarter of the 1,797 digits, drawn with equal shares of the ten classes, is the test set; the other 1,347 are trained on."""


@dataclass(frozen=True)
class Data:
    """What a model must know of the data before it can be made; images are (channels, side, side).

    Attributes:
        root: of the image folder; None for the digits.
        num_train: training images.
    """

    root: Path | None
    num_classes: int
    channels: int
    num_train: int


@dataclass(frozen=True)
class Loaders:
    train: DataLoader[Any]
    test: DataLoader[Any]
    sampler: DistributedSampler[Any]


def find_data(config: TrainConfig, process: Process) -> Data:
    """Look at the data without loading images.

    Raises:
        UsageError: if the folder is not there, is not laid out as expected or is empty, or a step takes more than the data.
    """
    if config.data_dir is None:
        data = Data(None, num_classes=10, channels=1, num_train=1797 - DIGITS_TEST_SIZE)
    else:
        root = config.data_dir
        if not root.is_dir():
            raise UsageError(f"--data-dir {root}: no such folder")
        train, test = (_image_folder(root / part) for part in ("train", "val"))
        if train.classes != test.classes:
            raise UsageError(f"--data-dir {root}: train and val do not have the same classes")
        data = Data(root, len(train.classes), channels=3, num_train=len(train))
    step = config.batch_size * process.world_size
    if step > data.num_train:
        raise UsageError(
            f"--batch-size {config.batch_size}: a step of {step} images ({process.world_size} processes) "
            f"is more than the {data.num_train} training images"
        )
    return data


def make_loaders(config: TrainConfig, process: Process, data: Data, size: int, model_config: dict[str, Any]) -> Loaders:
    """Loaders of this process's share: training images drop what does not fill a step, test images are each seen by one process.

    Args:
        size: side of the images in pixels.
        model_config: mean, std, interpolation and the like that the model expects (timm's data config).
    """
    train, test = _digits(size) if data.root is None else _folder(data.root, size, model_config, config.skip_corrupt)
    # The digits lie in memory: worker processes would cost more than they bring.
    options: dict[str, Any] = {"pin_memory": process.device.type == "cuda"}
    if data.root is not None:
        # Workers that outlived an epoch would keep a random state that a resumed run does not have.
        options |= {"num_workers": config.workers, "worker_init_fn": _ignore_signals}
    sampler: DistributedSampler[Any] = DistributedSampler(
        train, process.world_size, process.rank, shuffle=True, seed=config.seed, drop_last=True
    )
    share = Subset(test, range(process.rank, len(cast(Sized, test)), process.world_size))
    return Loaders(
        train=DataLoader(train, config.batch_size, sampler=sampler, drop_last=True, **options),
        test=DataLoader(share, max(config.batch_size, 256), **options),
        sampler=sampler,
    )


def _digits(size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    parts = train_test_split(range(len(labels)), test_size=DIGITS_TEST_SIZE, stratify=digits.target, random_state=0)
    train, test = (torch.tensor(part) for part in parts)
    mean, std = images[train].mean(), images[train].std()

    def resized(index: Tensor) -> Tensor:
        normalized = (images[index] - mean) / std
        return torch.nn.functional.interpolate(normalized, size=(size, size), mode="bilinear")

    return TensorDataset(resized(train), labels[train]), TensorDataset(resized(test), labels[test])


def _image_folder(root: Path, transform: Any = None) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(root), transform, loader=_load)
    except OSError as error:
        # It says whether the folder, its class folders or their images are missing, or cannot be read.
        reason = str(error).split(". Supported")[0]
        raise UsageError(f"--data-dir {root.parent}: {reason}") from None


def _load(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # whatever a decoder raises on bytes that are no image
        reason = getattr(error, "strerror", None) or (f"{error}" if path not in f"{error}" else "no image file")
        raise RunError(f"{path}: cannot be read as an image: {reason}") from None


class _Readable(Dataset[Any]):
    """The images of a folder; where corrupt ones are skipped, the next that can be read is in the place of each."""

    def __init__(self, images: Any, skip_corrupt: bool) -> None:
        self._images = images
        self._skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        for later in range(len(self)):
            try:
                return self._images[(index + later) % len(self)]
            except RunError as error:
                if not self._skip_corrupt:
                    raise RunError(f"{error}; repair or remove it, or train with --skip-corrupt") from None
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise RunError(f"{self._images.root}: no image can be read")


def _ignore_signals(worker: int) -> None:
    """For a loader process: a signal may go to the whole group, and the process that it works for needs it to stop well."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


def _folder(root: Path, size: int, model_config: dict[str, Any], skip_corrupt: bool) -> tuple[Dataset[Any], Dataset[Any]]:
    from timm.data import create_transform

    common = {"input_size": (3, size, size)} | {k: model_config[k] for k in ("mean", "std", "interpolation")}
    train = create_transform(**common, is_training=True, auto_augment=None)
    test = create_transform(**common, is_training=False, crop_pct=model_config["crop_pct"])
    parts = ((root / "train", train), (root / "val", test))
    train, test = (_Readable(_image_folder(*part), skip_corrupt) for part in parts)
    return train, test
