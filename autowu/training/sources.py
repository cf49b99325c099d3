"""Where images come from: scikit-learn's digits, a folder, noise, or any dataset that timm knows by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from autowu.training.config import TrainConfig, UsageError

__all__ = ["DIGITS_TEST_SIZE", "Noise", "digits", "timm_dataset"]

DIGITS_TEST_SIZE = 450
"""A quarter of the 1,797 digits, drawn with equal shares of the ten classes, is the test set; the other 1,347 are trained on."""


def digits(size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """The digits for training and for the test, enlarged to `size` pixels."""
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


class Noise(Dataset[Any]):
    """Images of noise, ready in memory: what a model does with them costs what it costs, and their loading nothing.

    Args:
        number: of images.
        num_classes: of their labels.
        size: side in pixels.
    """

    NUM_TRAIN, NUM_TEST = 8192, 512
    _DIFFERENT = 64

    def __init__(self, number: int, num_classes: int, size: int) -> None:
        self._number, self._num_classes = number, num_classes
        self._images = torch.randn(self._DIFFERENT, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index % self._DIFFERENT], index % self._num_classes


def timm_dataset(config: TrainConfig, train: bool, transform: Callable[..., Any] | None = None, download: bool = False) -> Any:
    """The training or validation images of timm's dataset `config.dataset`.

    Raises:
        UsageError: if timm does not know it, a package is missing, or the data are not there and are not to be fetched.
    """
    from timm.data import create_dataset
    from torchvision.transforms import Compose

    if not config.dataset_download and config.dataset.lower().startswith("hf"):
        _keep_offline()
    split, root = config.train_split if train else config.val_split, config.data_dir
    try:
        if config.dataset.lower().startswith("torch/") and root is None:
            raise ValueError("needs --data-dir, the folder of the data")
        if download and root is not None:
            Path(root).mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"is_training": train, "batch_size": config.batch_size, "seed": config.seed, "download": download}
        images = create_dataset(config.dataset, None if root is None else str(root), split, **options)
    except (Exception, SystemExit) as error:  # each source raises errors of its own
        hint = "" if config.dataset_download else "; --dataset-download fetches what can be fetched"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"--dataset {config.dataset}: cannot be opened: {reason}{hint}") from None
    if transform is not None:
        images.transform = Compose([_rgb, transform])
    return images


def _keep_offline() -> None:
    """See that Hugging Face's packages fetch nothing."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True


def _rgb(image: Any) -> Any:
    return image.convert("RGB") if hasattr(image, "convert") else image
