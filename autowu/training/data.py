"""The data of a run: what a model must know of them, and the loaders of each process's share."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from autowu.training.augment import mixing, transforms
from autowu.training.config import RunError, TrainConfig, UsageError
from autowu.training.draws import Augmented, Draws
from autowu.training.process import Process
from autowu.training.sources import DIGITS_TEST_SIZE, Noise, digits, timm_dataset

__all__ = ["Data", "Loaders", "find_data", "make_loaders"]

_NOISE_CLASSES = 1000
_SMALL = {"torch/cifar10", "torch/cifar100", "torch/mnist", "torch/kmnist", "torch/fashion_mnist", "torch/qmnist"}


@dataclass(frozen=True)
class Data:
    """What a model must know of the data before it can be made; images are (channels, side, side).

    Attributes:
        num_train: training images.
        small: whether images are enlarged to 32 pixels at most, where a model takes that.
    """

    num_classes: int
    channels: int
    num_train: int
    small: bool = False


class _Epochs(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Loaders:
    """Training images by the step, all batches that are accumulated in one, and test images; `sampler` is told the epoch."""

    train: DataLoader[Any] | Streamed
    test: DataLoader[Any]
    sampler: _Epochs

    def close(self) -> None:
        """End the loader processes, which live for the run: they heed no signal by which multiprocessing would end them."""
        for loader in (self.train, self.test):
            if (iterator := getattr(loader, "_iterator", None)) is not None:
                iterator._shutdown_workers()


def find_data(config: TrainConfig, process: Process) -> Data:
    """Look at the data without loading images; fetch them where that is asked for.

    Raises:
        UsageError: if they are not there, are not laid out as expected or are empty, or a step takes more than all of them.
    """
    data = _look(config, process)
    if config.num_classes is not None:
        if config.num_classes < data.num_classes and config.dataset != "synthetic":
            raise UsageError(f"--num-classes {config.num_classes}: the data have {data.num_classes}")
        data = Data(config.num_classes, data.channels, data.num_train, data.small)
    step = config.step_size * process.world_size
    if step > data.num_train:
        raise UsageError(
            f"--batch-size {config.batch_size}: a step of {step} images "
            f"({process.world_size} processes{f' x --grad-accum {config.grad_accum}' if config.grad_accum > 1 else ''}) "
            f"is more than the {data.num_train} training images"
        )
    return data


def _look(config: TrainConfig, process: Process) -> Data:
    if config.dataset == "digits":
        return Data(num_classes=10, channels=1, num_train=1797 - DIGITS_TEST_SIZE, small=True)
    if config.dataset == "synthetic":
        return Data(_NOISE_CLASSES, channels=3, num_train=Noise.NUM_TRAIN)
    if config.dataset == "folder":
        from autowu.training.folders import image_folder

        root = cast(Path, config.data_dir)
        if not root.is_dir():
            raise UsageError(f"--data-dir {root}: no such folder")
        train, test = (image_folder(root / part) for part in ("train", "val"))
        if train.classes != test.classes:
            raise UsageError(f"--data-dir {root}: train and val do not have the same classes")
        return Data(len(train.classes), channels=3, num_train=len(train))
    if config.dataset_download:
        process.on_main(lambda: bool(_open(config, download=True)))
    images = _open(config)
    reader = getattr(images, "reader", None)
    classes = getattr(images, "classes", None) or getattr(reader, "class_to_idx", None) or ()
    if not classes and config.num_classes is None:
        raise UsageError(f"--dataset {config.dataset}: does not say its classes; give --num-classes")
    num_train = getattr(reader, "num_samples", None) if isinstance(images, IterableDataset) else len(images)
    return Data(len(classes), 3, num_train or 0, config.dataset.lower() in _SMALL)


def _open(config: TrainConfig, download: bool = False) -> Any:
    """The training images of a dataset of timm's; it is seen that the others are there too."""
    timm_dataset(config, False, download=download)
    return timm_dataset(config, True, download=download)


def make_loaders(config: TrainConfig, process: Process, data: Data, size: int, model_config: dict[str, Any]) -> Loaders:
    """Loaders of this process's share: training images drop what does not fill a step, test images are each seen by one process.

    Args:
        size: side of the images in pixels.
        model_config: mean, std, interpolation and the like that the model expects (timm's data config).
    """
    train, test = _images(config, data, size, model_config)
    in_memory = config.dataset in ("digits", "synthetic")
    options: dict[str, Any] = {"pin_memory": process.device.type == "cuda"}
    if not in_memory:  # where worker processes would cost more than they bring
        options |= {"num_workers": config.workers, "worker_init_fn": _ignore_signals, "persistent_workers": config.workers > 0}
        options |= {"generator": torch.Generator()}  # a loader that goes on draws nothing, one that begins does
    if isinstance(train, IterableDataset):
        return _streams(config, process, data, train, test, options)
    share = Subset(test, range(process.rank, len(cast(Sized, test)), process.world_size))
    test_loader = DataLoader(share, max(config.batch_size, 256), **options)
    mix, size_of_train = mixing(config, data.num_classes), len(cast(Sized, train))
    if in_memory and mix is None and config.aug_repeats <= 1:
        sampler: DistributedSampler[Any] = DistributedSampler(
            train, process.world_size, process.rank, shuffle=True, seed=config.seed, drop_last=True
        )
        return Loaders(DataLoader(train, config.step_size, sampler=sampler, drop_last=True, **options), test_loader, sampler)
    draws = Draws(size_of_train, process, config.seed, config.aug_repeats)
    augmented = Augmented(train, mix, config.batch_size)
    options |= {"sampler": draws, "drop_last": True, "collate_fn": _as_it_is}
    return Loaders(DataLoader(augmented, config.step_size, **options), test_loader, draws)


def _images(config: TrainConfig, data: Data, size: int, model_config: dict[str, Any]) -> tuple[Dataset[Any], Dataset[Any]]:
    if config.dataset == "digits":
        return digits(size)
    if config.dataset == "synthetic":
        return Noise(Noise.NUM_TRAIN, data.num_classes, size), Noise(Noise.NUM_TEST, data.num_classes, size)
    of_train, of_test = transforms(config, size, model_config)
    if config.dataset != "folder":
        return timm_dataset(config, True, of_train), timm_dataset(config, False, of_test)
    from autowu.training.folders import Readable, image_folder

    root = cast(Path, config.data_dir)
    parts = ((root / "train", of_train), (root / "val", of_test))
    train, test = (Readable(image_folder(*part), config.skip_corrupt) for part in parts)
    return train, test


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """For a loader process: a signal may go to the whole group, and the process that it works for needs it to stop well."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


class Streamed:
    """As many steps an epoch as the data fill, of a dataset that is read from its beginning and splits itself over processes."""

    def __init__(self, loader: DataLoader[Any], dataset: Any, seed: int, steps: int) -> None:
        self._loader, self._dataset, self._seed, self._steps = loader, dataset, seed, steps

    def set_epoch(self, epoch: int) -> None:
        self._dataset.set_epoch(epoch)
        if self._loader.generator is not None:
            self._loader.generator.manual_seed(self._seed + epoch)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        done = 0
        while done < self._steps:
            before = done
            for batch in self._loader:
                yield batch
                done += 1
                if done == self._steps:
                    return
            if done == before:
                raise RunError("this process has no full batch of its share of the stream; take a smaller --batch-size")


def _streams(config: TrainConfig, process: Process, data: Data, train: Any, test: Any, options: dict[str, Any]) -> Loaders:
    for images in (train, test):
        images.set_loader_cfg(num_workers=config.workers)
    options |= {"persistent_workers": False}  # each epoch begins with the dataset as it is told
    if mixing(config, data.num_classes) is not None or config.aug_repeats > 1:
        raise UsageError(f"--dataset {config.dataset}: is read as a stream, which takes no --mixup, --cutmix or --aug-repeats")
    loader = DataLoader(train, config.step_size, drop_last=True, **options)
    streamed = Streamed(loader, train, config.seed, data.num_train // (config.step_size * process.world_size))
    return Loaders(streamed, DataLoader(test, max(config.batch_size, 256), **options), streamed)
