"""Model, optimizer and scheduler by name, and what a step needs of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autowu.scheduler import AutoWU
from autowu.training.config import TrainConfig
from autowu.training.data import Data, Loaders, make_loaders
from autowu.training.layers import check_layer_log
from autowu.training.models import build_model
from autowu.training.optimizers import build_optimizer, build_scheduler
from autowu.training.process import Process
from autowu.training.shards import clip_adaptively, shard

__all__ = ["Parts", "allow_tf32", "build", "build_model", "build_parts"]


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
        amp: whether the forward pass runs in `amp_dtype`.
        grad_accum: batches per optimizer step.
        amp_dtype: bfloat16 or float16.
        scaler: of the loss, where gradients are of float16.
        clip_grad: where gradients are clipped; None or 0 for nowhere.
        clip_mode: by their norm, by value or adaptively (timm's names).
        ema: average of the weights, timm's; what is tested where it is.
        fsdp: whether each process has a shard of the model only.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    criterion: nn.Module
    device: torch.device
    amp: bool
    grad_accum: int = 1
    amp_dtype: torch.dtype = torch.bfloat16
    scaler: GradScaler | None = None
    clip_grad: float | None = None
    clip_mode: str = "norm"
    ema: Any = None
    fsdp: bool = False

    @property
    def tested(self) -> nn.Module:
        """The model, or its average."""
        return self.model if self.ema is None else self.ema.module

    @property
    def autowu(self) -> AutoWU | None:
        """The scheduler, where it is one that follows the losses."""
        return self.scheduler if isinstance(self.scheduler, AutoWU) else None

    @property
    def lr(self) -> float:
        """The largest LR of a parameter group."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def phase(self) -> str:
        """AutoWU's phase; empty for another scheduler."""
        return "" if self.autowu is None else self.autowu.phase

    @property
    def probability(self) -> float | None:
        """Of the minimum being past, as AutoWU's last test had it; on the main process."""
        if self.autowu is None:
            return None
        if self.autowu.switch is not None:
            return self.autowu.switch.probability
        return None if self.autowu.decision is None else self.autowu.decision.probability

    @property
    def events(self) -> dict[int, str]:
        """Kinds of what AutoWU met, by the number of steps that were taken by then; those from before the first count to it."""
        found: dict[int, str] = {}
        for event in [] if self.autowu is None else self.autowu.events:
            step = max(1, event.step)
            found[step] = f"{found[step]} {event.kind}" if step in found else event.kind
        return found

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp)

    def synced(self, now: bool) -> AbstractContextManager[None]:
        """Whether the backward pass within averages gradients over the processes, which accumulated ones wait for."""
        parallel: Any = getattr(self.forward, "_orig_mod", self.forward)  # inside of torch.compile
        if self.fsdp:
            parallel.set_requires_gradient_sync(now)
        if now or not isinstance(parallel, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return parallel.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients those of a loss, a 0-d tensor."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def step_optimizer(self) -> None:
        """Clip the gradients and take the step, but one of gradients that float16 does not hold; then average the weights."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip_grad:
            from timm.models import model_parameters
            from timm.utils import dispatch_clip_grad

            clipped = model_parameters(self.model, exclude_head=self.clip_mode == "agc")
            if self.fsdp and self.clip_mode == "agc":
                clip_adaptively(clipped, self.clip_grad)
            else:
                dispatch_clip_grad(clipped, self.clip_grad, self.clip_mode)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None and not (self.autowu is not None and self.autowu.in_ramp):  # whose steps are undone
            self.ema.update(self.model, step=self.scheduler.last_epoch + 1)

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside model, optimizer and scheduler: the average and the scaler, where there are any."""
        state = {} if self.ema is None else {"ema": self.ema.module.state_dict()}
        return state if self.scaler is None else state | {"scaler": self.scaler.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`extra_state` gave, from among what a checkpoint holds."""
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def step_scheduler(self, loss: Tensor) -> None:
        """Tell the scheduler of an optimizer step and this process's loss, a 0-d tensor."""
        if self.autowu is not None:
            self.autowu.step(loss)  # it takes the mean over the processes
            return
        with warnings.catch_warnings():
            if self.scaler is not None:  # torch takes a first step that was left out for a wrong order of calls
                warnings.simplefilter("ignore", UserWarning)
            self.scheduler.step()


def allow_tf32(asked: bool, device: torch.device) -> None:
    """Let matrices of float32 be multiplied in TensorFloat32 where it is asked for, on a GPU; convolutions are, as torch has it."""
    if asked and device.type == "cuda":
        torch.set_float32_matmul_precision("high")


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
    on_gpu = process.device.type == "cuda"
    if config.sync_bn and process.world_size > 1 and on_gpu:
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activations of timm's layers

        model = convert_sync_batchnorm(model)
    if on_gpu and not config.fsdp if config.channels_last is None else config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = _average(config, model)
    if config.fsdp:
        for split in [model] if ema is None else [model, ema.module]:
            shard(split, process)
    optimizer = build_optimizer(config, model)
    if config.log_layers is not None:
        check_layer_log(config, optimizer)
    put_back = None if ema is None else lambda step: _undo(ema, model, scheduler)
    scheduler: Any = build_scheduler(config, model, optimizer, steps_per_epoch, put_back)
    mixed = config.mixup or config.cutmix  # labels are smoothed where they are mixed
    return Parts(
        model=model,
        forward=_forward(config, process, model),
        optimizer=optimizer,
        scheduler=scheduler,
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixed else config.label_smoothing),
        device=process.device,
        amp=config.amp,
        grad_accum=config.grad_accum,
        amp_dtype=getattr(torch, config.amp_dtype),
        scaler=GradScaler(process.device.type) if config.amp and config.amp_dtype == "float16" else None,
        clip_grad=config.clip_grad,
        clip_mode=config.clip_mode,
        ema=ema,
        fsdp=config.fsdp,
    )


def _undo(ema: Any, model: nn.Module, scheduler: Any) -> None:
    """An average of what was undone is undone; of a ramp it has seen nothing."""
    if not scheduler.in_ramp:
        ema.set(model)


def _average(config: TrainConfig, model: nn.Module) -> Any:
    if not config.model_ema:
        return None
    from timm.utils import ModelEmaV3

    # Whole tensors and shards do not mix in one multi-tensor operation.
    return ModelEmaV3(model, config.model_ema_decay, use_warmup=config.model_ema_warmup, foreach=not config.fsdp)


def _forward(config: TrainConfig, process: Process, model: nn.Module) -> nn.Module:
    forward: nn.Module = model
    if process.world_size > 1 and not config.fsdp:
        ids = [process.device.index] if process.device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    return torch.compile(forward) if config.compile else forward  # type: ignore[return-value]
