"""What is done to an image of a folder before a model sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autowu.training.config import TrainConfig, UsageError

__all__ = ["Lighting", "mixing", "transforms"]


class Lighting:
    """Shift the colours of an image along the principal components of ImageNet's, as for AlexNet (Krizhevsky et al. 2012).

    Args:
        std: standard deviation of the three coefficients, which are drawn anew for every image.
    """

    VARIANCES = (0.2175, 0.0188, 0.0045)
    """Eigenvalues of the covariance of the colours of ImageNet, red, green and blue from 0 to 1."""
    COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
    """Their eigenvectors, as columns."""

    def __init__(self, std: float) -> None:
        self.std = std
        self._scaled = torch.tensor(self.COMPONENTS) * torch.tensor(self.VARIANCES)

    def __call__(self, image: Tensor) -> Tensor:
        """`image` of shape (3, height, width), with values from 0 to 1."""
        shift = self._scaled @ (torch.randn(3) * self.std)
        return image + shift[:, None, None]


def transforms(config: TrainConfig, size: int, model_config: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """timm's transforms of a PIL image for training and for the test, to a normalised tensor of shape (3, `size`, `size`).

    Args:
        config: what the training images go through.
        size: side in pixels.
        model_config: mean, std, interpolation and crop_pct that the model expects (timm's data config).

    Raises:
        UsageError: if timm does not know an augmentation.
    """
    from timm.data import create_transform
    from torchvision.transforms import Normalize

    common = {"input_size": (3, size, size)} | {k: model_config[k] for k in ("mean", "std", "interpolation")}
    named = {name: getattr(config, name) for name in ("no_aug", "scale", "ratio", "hflip", "vflip", "color_jitter")}
    named |= {"auto_augment": None if config.auto_augment in (None, "", "none") else config.auto_augment}
    named |= {"re_prob": config.reprob, "re_mode": config.remode, "re_count": config.recount}
    try:
        train = create_transform(**common, **named, is_training=True)
    except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:  # of its policy strings
        raise UsageError(f"--auto-augment {config.auto_augment}: not known to timm: {error or type(error).__name__}") from None
    if config.lighting:
        (place,) = (k for k, step in enumerate(train.transforms) if isinstance(step, Normalize))
        train.transforms.insert(place, Lighting(config.lighting))
    return train, create_transform(**common, is_training=False, crop_pct=model_config["crop_pct"])


def mixing(config: TrainConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix of a batch of images and labels, to images and soft labels; None where neither is asked for.

    Raises:
        UsageError: if a batch cannot be mixed in pairs.
    """
    if not config.mixup and not config.cutmix:
        return None
    if config.batch_size % 2:
        raise UsageError(f"--batch-size {config.batch_size}: must be even with --mixup or --cutmix")
    from timm.data import Mixup

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
    return mix
