"""Model, optimizer and scheduler by name, and what a step needs of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autowu.scheduler import AutoWU
from autowu.training.config import TrainConfig
from autowu.training.data import Data, Loaders, make_loaders
from autowu.training.layers import check_layer_log
from autowu.training.models import build_model
from autowu.training.optimizers import build_optimizer, build_scheduler
from autowu.training.process import Process

__all__ = ["Parts", "build", "build_model", "build_parts"]


@dataclass(frozen=True)
class Parts:
    """What a training step uses and changes, on the device of this process.

    Attributes:
        model: what is tested and saved.
        forward: what is trained: the model, in a group in the wrapper that averages its gradients over the processes.
        optimizer: of the model's parameters.
        scheduler: of the optimizer.
        criterion: (logits, labels) to the loss.
        device: of this process.
        amp: whether the forward pass runs in bfloat16.
        grad_accum: batches per optimizer step.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    criterion: nn.Module
    device: torch.device
    amp: bool
    grad_accum: int = 1

    @property
    def autowu(self) -> AutoWU | None:
        """The scheduler, where it is one that follows the losses."""
        return self.scheduler if isinstance(self.scheduler, AutoWU) else None

    @property
    def lr(self) -> float:
        """LR of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def phase(self) -> str:
        """AutoWU's phase; empty for another scheduler."""
        return "" if self.autowu is None else self.autowu.phase

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def synced(self, now: bool) -> AbstractContextManager[None]:
        """Whether the backward pass within averages gradients over the processes, which accumulated ones wait for."""
        if now or not isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def step_scheduler(self, loss: Tensor) -> None:
        """Tell the scheduler of an optimizer step and this process's loss, a 0-d tensor."""
        if self.autowu is None:
            self.scheduler.step()
        else:
            self.autowu.step(loss)  # it takes the mean over the processes


def build(config: TrainConfig, process: Process, data: Data) -> tuple[Parts, Loaders]:
    """What `config` asks for, and loaders of images as its model takes them.

    Raises:
        UsageError: if something of it cannot be.
    """
    built = build_model(config, data)
    loaders = make_loaders(config, process, data, built.size, built.data_config)
    return build_parts(config, process, built.module, len(loaders.train)), loaders


def build_parts(config: TrainConfig, process: Process, model: nn.Module, steps_per_epoch: int) -> Parts:
    """The parts of a run that trains `model`, which moves to the device of `process`.

    Raises:
        UsageError: if there is no such optimizer, or it or the scheduler does not take what `config` says.
    """
    model = model.to(process.device)
    if config.sync_bn and process.world_size > 1 and process.device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activations of timm's layers

        model = convert_sync_batchnorm(model)
    if process.device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(config, model)
    if config.log_layers is not None:
        check_layer_log(config, optimizer)
    scheduler = build_scheduler(config, model, optimizer, steps_per_epoch)
    forward: nn.Module = model
    if process.world_size > 1:
        ids = [process.device.index] if process.device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    mixed = config.mixup or config.cutmix  # labels are smoothed where they are mixed
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixed else config.label_smoothing)
    return Parts(model, forward, optimizer, scheduler, criterion, process.device, config.amp, config.grad_accum)
