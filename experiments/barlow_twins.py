"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): two views of an image should have the same, and no redundant, features.

The cross-correlation of the features is that of the whole batch, over all processes, and so are the statistics that normalise them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DIGITS", "PHOTOS", "Augmentation", "BarlowTwins", "cross_correlation", "linear_probe", "redundancy_loss", "view"]

_EPS = 1e-5


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the processes, whose gradient is summed over them too.

    All processes compute the same loss of the sum. Summed gradients are thus as many times too large as there are processes, and
    DistributedDataParallel's mean takes that back. With an all_reduce that autograd does not see they would be that much too small.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _over_ranks(value: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]
    return total


def _centred(*features: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features of this process, (images, features) each, less their mean over the images of all; and the number of those."""
    count = features[0].new_tensor([len(features[0])])
    total = _over_ranks(torch.cat([*(part.sum(0) for part in features), count]))
    means = (total[:-1] / total[-1]).view(len(features), -1)
    return [part - mean for part, mean in zip(features, means, strict=True)], total[-1].detach()


class WholeBatchNorm(nn.Module):
    """Batch norm of (images, features) whose statistics are those of all processes, on a CPU too; torch's own needs GPUs.

    It is for training: it keeps no running statistics.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        (centred,), count = _centred(features)
        variance = _over_ranks(centred.square().sum(0)) / count
        return centred * torch.rsqrt(variance + _EPS) * self.weight + self.bias


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of every feature of the first view with every one of the second, over the images of all processes.

    Args:
        first, second: features of the two views of this process's images, (images, features).

    Returns:
        (features, features), from -1 to 1.
    """
    (first, second), count = _centred(first, second)
    width = first.shape[1]
    own = torch.cat([first.square().sum(0), second.square().sum(0), (first.T @ second).flatten()])
    whole = _over_ranks(own) / count
    deviation = (whole[: 2 * width] + _EPS).sqrt()
    return whole[2 * width :].view(width, width) / torch.outer(deviation[:width], deviation[width:])


def redundancy_loss(correlation: Tensor, lmbda: float) -> Tensor:
    """How far a cross-correlation is from the identity; `lmbda` weighs what is off the diagonal."""
    diagonal = correlation.diagonal()
    on = (diagonal - 1).square().sum()
    return on + lmbda * (correlation.square().sum() - diagonal.square().sum())


class BarlowTwins(nn.Module):
    """An encoder and its projector; called with two views of the images it gives their loss, the same on all processes.

    Args:
        encoder: from images to features.
        width: number of the encoder's features.
        projector: widths of the projector's dense layers.
        lmbda: weight of the redundancy.
    """

    def __init__(self, encoder: nn.Module, width: int, projector: Sequence[int], lmbda: float) -> None:
        super().__init__()
        self.encoder, self.lmbda = encoder, lmbda
        layers: list[nn.Module] = []
        for inputs, outputs in zip([width, *projector[:-2]], projector[:-1], strict=True):
            layers += [nn.Linear(inputs, outputs, bias=False), WholeBatchNorm(outputs), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear([width, *projector][-2], projector[-1], bias=False))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        features = (self.projector(self.encoder(images)) for images in (first, second))
        return redundancy_loss(cross_correlation(*features), self.lmbda)


@dataclass(frozen=True)
class Augmentation:
    """Of the views.

    Attributes:
        rotation: at most, in degrees.
        sides: least and largest side of what a view shows, of the image's own.
        shift: at most, in half sides, beyond what the side leaves.
        flip: whether half of them are mirrored.
        jitter: of contrast, and half as much of brightness; of each colour by itself where there are several.
        grey: share of colour images that lose their colours.
        noise: standard deviation.
    """

    rotation: float
    sides: tuple[float, float]
    shift: float
    flip: bool
    jitter: float
    grey: float
    noise: float


DIGITS = Augmentation(rotation=15, sides=(0.75, 1.25), shift=0.2, flip=False, jitter=0.4, grey=0.0, noise=0.2)
PHOTOS = Augmentation(rotation=0, sides=(0.3, 1.0), shift=0.0, flip=True, jitter=0.4, grey=0.2, noise=0.05)


def view(images: Tensor, how: Augmentation) -> Tensor:
    """A random view of each image of a batch, (images, channels, side, side), whose values have a deviation of about 1."""
    count, channels = images.shape[:2]

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, device=images.device) - 1

    angle = torch.deg2rad(how.rotation * uniform())
    low, high = how.sides
    side = low * (high / low) ** torch.rand(count, device=images.device)
    mirror = uniform().sign() if how.flip else torch.ones_like(side)
    shift = (how.shift + (1 - side).clamp(min=0))[:, None] * uniform(2)
    turn = torch.stack([mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([side[:, None, None] * turn, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    seen = seen * (1 + how.jitter * uniform(channels, 1, 1)) + how.jitter / 2 * uniform(channels, 1, 1)
    if how.grey and channels > 1:
        seen = torch.where(torch.rand(count, 1, 1, 1, device=images.device) < how.grey, seen.mean(1, keepdim=True), seen)
    return seen + how.noise * torch.randn_like(seen)


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, decay: float = 1e-3) -> float:
    """Accuracy (0 to 1) on test features of a logistic regression on training features, which are standardised.

    Args:
        train, test: features, (images, features), and labels.
        classes: of the labels.
        decay: weight of half the squared norm of the weights, beside the mean cross entropy.
    """
    mean, deviation = train[0].mean(0), train[0].std(0) + _EPS
    inputs, tested = ((part[0] - mean) / deviation for part in (train, test))
    weight = torch.zeros(inputs.shape[1], classes, device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, train[1]) + decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(((tested @ weight + bias).argmax(1) == test[1]).double().mean())
