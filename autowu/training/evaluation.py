"""How good the model is: the test after every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autowu.training.build import Parts
from autowu.training.process import Process

__all__ = ["average_batch_norm", "evaluate"]


@torch.no_grad()
def average_batch_norm(model: nn.Module, process: Process) -> None:
    """Give all processes the mean of their batch-norm statistics, which differ by what each saw in its last step."""
    if process.world_size > 1:
        from timm.utils import distribute_bn

        distribute_bn(model, process.world_size, reduce=True)


@torch.no_grad()
def evaluate(parts: Parts, loader: DataLoader[Any], process: Process) -> tuple[float, float]:
    """Mean cross entropy and accuracy (0 to 1) over the images of all processes' loaders. Leaves what it tests in eval mode."""
    model = parts.tested.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=process.device)
    for images, labels in _in_step(loader, process) if parts.fsdp else loader:
        images, labels = images.to(process.device), labels.to(process.device)
        with parts.autocast():
            logits = model(images)[: len(labels)]
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        totals += torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double(), loss.new_tensor(len(labels)).double()])
    loss_sum, correct, count = process.sum(totals).tolist()
    return loss_sum / count, correct / count


def _in_step(loader: DataLoader[Any], process: Process) -> Iterator[tuple[Tensor, Tensor]]:
    """As many batches on each process, which a sharded model needs; where there is none left, a blank image without a label."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        shapes = process.gather(None if batch is None else batch[0].shape[1:])
        if (shape := next((shape for shape in shapes if shape is not None), None)) is None:
            return
        yield batch if batch is not None else (torch.zeros(1, *shape), torch.zeros(0, dtype=torch.long))
