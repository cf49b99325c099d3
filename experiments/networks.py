"""The networks of the experiments: small ones for the digits, and for images of a root AlexNet or any model of timm's."""

from __future__ import annotations

import torch
from images import Images
from torch import nn

from autowu.training.config import UsageError
from autowu.training.models import build_model

__all__ = ["alexnet", "classifier", "encoder", "small_encoder"]


def classifier(images: Images) -> nn.Module:
    """The network of `--mode clf`, from images to logits."""
    if images.name == "digits":
        features, width = small_encoder()
        return nn.Sequential(features, nn.Linear(width, images.data.num_classes))
    return build_model(images.config, images.data).module


def encoder(images: Images) -> tuple[nn.Module, int]:
    """The same network up to its pooled features, and their number."""
    if images.name == "digits":
        return small_encoder()
    model = build_model(images.config, images.data).module
    model.reset_classifier(0)  # type: ignore[operator]
    with torch.no_grad():
        width = model.eval()(torch.zeros(1, images.data.channels, images.size, images.size)).shape[1]
    return model.train(), width


def small_encoder() -> tuple[nn.Module, int]:
    """Three convolutions and a mean over the image. Group norm is the same on any number of processes; batch norm is not."""

    def conv(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()

    layers = (*conv(1, 16, 1), *conv(16, 32, 2), *conv(32, 64, 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64


def alexnet(images: Images) -> nn.Module:
    """AlexNet, torchvision's, for images of 63 pixels or more; for the digits five convolutions and three dense layers likewise.

    Raises:
        UsageError: if the images are smaller.
    """
    if images.name == "digits":
        return _SmallAlexNet(images.data.num_classes)
    if images.size < 63:
        raise UsageError(f"--img-size {images.size}: AlexNet takes 63 or more")
    from torchvision.models import alexnet as whole

    model: nn.Module = whole(num_classes=images.data.num_classes)
    return model


class _SmallAlexNet(nn.Sequential):
    """AlexNet's layers, less wide and without its strides."""

    def __init__(self, classes: int) -> None:
        def conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
            return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()

        super().__init__(
            *(*conv(1, 16), nn.MaxPool2d(2)),
            *(*conv(16, 32), nn.MaxPool2d(2)),
            *(*conv(32, 64), *conv(64, 48), *conv(48, 48), nn.Flatten()),
            *(nn.Dropout(), nn.Linear(192, 128), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)),
        )
        for layer in self:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
