"""What all experiments do: the step, the schedule of the LR, the test, and how long an epoch took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from autowu import AutoWU
from autowu.schedules import cooldown_factor
from autowu.training.data import Loaders
from autowu.training.process import Process

__all__ = ["SCHEDULES", "evaluate", "found_by", "make_schedule", "parallel", "train"]

SCHEDULES = ("None", "cosine", "lars-warm", "autowu")
_WARMUP = 0.1


def make_schedule(name: str, optimizer: Optimizer, model: nn.Module, steps: int) -> LRScheduler | None:
    """The schedule of a run of `steps` steps.

    "None" leaves the LR as it is. "cosine" brings it to 0; "lars-warm" does so after a linear warm-up of a tenth of the run.
    "autowu" finds an LR, whatever the optimizer has.
    """
    if name == "None":
        return None
    if name == "autowu":
        return AutoWU(optimizer, total_steps=steps, model=model)
    warmup = round(_WARMUP * steps) if name == "lars-warm" else 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return cooldown_factor(min(1.0, (step - warmup) / (steps - warmup)))

    return LambdaLR(optimizer, factor)


def parallel(module: nn.Module, process: Process) -> nn.Module:
    """The module, in a group in the wrapper that averages its gradients over the processes."""
    if process.world_size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, [process.device.index] if process.device.type == "cuda" else None)


def train(
    module: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    loaders: Loaders,
    epochs: int,
    device: torch.device,
    after_step: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Train `module`; the seconds of every epoch.

    Args:
        module: what is trained.
        loss_of: from images and labels to a 0-d loss.
        optimizer, scheduler: of the module's parameters.
        loaders: of the images.
        epochs: how often all images are seen.
        device: where the module is.
        after_step: called with the number of the step when the optimizer has taken it, from 0.
    """
    module.train()
    step, seconds = 0, []
    for epoch in range(epochs):
        loaders.sampler.set_epoch(epoch)
        began = _clock(device)
        for images, labels in loaders.train:
            loss = loss_of(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            after_step(step)
            if isinstance(scheduler, AutoWU):
                scheduler.step(loss.detach())
            elif scheduler is not None:
                scheduler.step()
            step += 1
        seconds.append(_clock(device) - began)
    return seconds


def _clock(device: torch.device) -> float:
    """Seconds of this process, which others on the machine hardly change; on a GPU, seconds by the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def evaluate(model: nn.Module, loaders: Loaders, process: Process) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 accuracy (0 to 1) on the test images of all processes, for the file of the results."""
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=process.device)
    for images, labels in loaders.test:
        images, labels = images.to(process.device), labels.to(process.device)
        logits = model(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        own = (F.cross_entropy(logits, labels, reduction="sum"), hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)))
        totals += torch.stack([value.double().to(process.device) for value in own])
    model.train()
    loss, top1, top5, count = process.sum(totals).tolist()
    loss = loss / count if math.isfinite(loss) else None
    return {"test_loss": loss and round(loss, 5), "top1": round(top1 / count, 5), "top5": round(top5 / count, 5)}


def found_by(scheduler: LRScheduler | None, lr: float | None) -> dict[str, Any]:
    """The peak of the LR, the one that was given or AutoWU's, and the step of its switch."""
    if not isinstance(scheduler, AutoWU):
        return {"peak_lr": lr, "switch_step": None}
    switch, setbacks = scheduler.switch, sum(event.kind == "divergence" for event in scheduler.events)
    if switch is None:
        return {"peak_lr": None, "switch_step": None}
    return {"peak_lr": float(f"{switch.lr * 0.5**setbacks:.4g}"), "switch_step": switch.step}
