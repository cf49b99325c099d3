"""Model, optimizer and scheduler by name, and what a step needs of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from autowu.families import family
from autowu.optim import LAMB, LARS, TVLARS, param_groups
from autowu.scheduler import AutoWU
from autowu.schedules import cooldown_factor
from autowu.training.config import TrainConfig, UsageError, unknown_name
from autowu.training.data import Data, Loaders, make_loaders
from autowu.training.layers import check_layer_log
from autowu.training.process import Process

__all__ = ["HAND_SET_LR", "Model", "Parts", "build", "build_model", "build_optimizer", "build_parts", "build_scheduler"]

HAND_SET_LR = {"sgd": 0.1, "adam": 1e-3, "lars": 3.0, "lamb": 1e-2, "unknown": 1e-3}
"""Peak LR of ``--sched cosine`` where none is given, by the optimizer's family."""

_OURS = ("lars", "lamb", "tvlars")
_DIGITS_SIZE = 32
_COSINE_WARMUP_FRACTION = 0.05


@dataclass(frozen=True)
class Model:
    """A model on the CPU, the side of the images that it takes, and how timm says they are to be prepared."""

    module: nn.Module
    size: int
    data_config: dict[str, Any]


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
    """

    model: nn.Module
    forward: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    criterion: nn.Module
    device: torch.device
    amp: bool

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
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

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
    if config.sync_bn and process.world_size > 1:
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
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return Parts(model, forward, optimizer, scheduler, criterion, process.device, config.amp)


def build_model(config: TrainConfig, data: Data) -> Model:
    """The timm model `config.model` for `data`.

    Digits are enlarged to 32 pixels, or to the model's own input size where it does not take so small an image.

    Raises:
        UsageError: if timm does not know the model, or the model does not take images of the size asked for.
    """
    import timm

    if not timm.is_model(config.model):
        raise unknown_name("--model", config.model, timm.list_models())
    sizes = [config.img_size]
    if config.img_size is None:
        sizes = [_DIGITS_SIZE, None] if data.root is None else [None]
    for size in sizes:
        try:
            return _build_for(config.model, data, size)
        except Exception as error:  # whatever a model raises on images that it cannot take
            reason = error
    raise UsageError(f"--model {config.model}: cannot be built for {sizes[-1] or 'its own'} pixels: {reason}")


def _build_for(name: str, data: Data, size: int | None) -> Model:
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's notices on deprecated model names
        module = timm.create_model(name, num_classes=data.num_classes, in_chans=data.channels)
        if size is not None and module.pretrained_cfg.get("fixed_input_size", False):
            module = timm.create_model(name, num_classes=data.num_classes, in_chans=data.channels, img_size=size)
    data_config = timm.data.resolve_model_data_config(module)
    size = size or data_config["input_size"][-1]
    with torch.no_grad():
        module.eval()(torch.zeros(1, data.channels, size, size))
    return Model(module.train(), size, data_config)


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer `config.opt` over the parameters of `model`; norms and biases without decay and adaptation.

    Raises:
        UsageError: if there is no such optimizer.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if config.opt.lower() in _OURS:
        return _build_ours(config.opt.lower(), config, model)
    if config.opt.lower().removeprefix("lookahead_") not in list_optimizers():
        raise unknown_name("--opt", config.opt, [*_OURS, *list_optimizers()])
    try:
        # The first is made to learn its family, which the LR depends on.
        optimizer: Optimizer = create_optimizer_v2(model, config.opt, 1e-3, config.weight_decay, config.momentum)
        lr = config.lr or HAND_SET_LR[family(optimizer)]
        optimizer = create_optimizer_v2(model, config.opt, lr, config.weight_decay, config.momentum)
    except Exception as error:  # an optional package that is not installed, arguments that it does not take
        raise UsageError(f"--opt {config.opt}: cannot be built: {error or type(error).__name__}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"--opt {config.opt}: needs second derivatives, which train.py does not compute")
    return optimizer


def _build_ours(name: str, config: TrainConfig, model: nn.Module) -> Optimizer:
    groups = param_groups(model, config.weight_decay)
    lr = config.lr or HAND_SET_LR["lamb" if name == "lamb" else "lars"]
    if name == "lamb":
        return LAMB(groups, lr)
    if name == "tvlars":
        return TVLARS(groups, lr, config.momentum)
    return LARS(SGD(groups, lr, config.momentum))


def build_scheduler(config: TrainConfig, model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> LRScheduler:
    """The scheduler `config.sched` of a run of `model`, stepped once an optimizer step.

    Raises:
        UsageError: if AutoWU does not take its options.
    """
    if config.sched == "cosine":
        total = config.epochs * steps_per_epoch
        warmup = max(1, round(_COSINE_WARMUP_FRACTION * total))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return cooldown_factor((min(step, total - 1) - warmup) / max(1, total - warmup))

        return LambdaLR(optimizer, factor)
    options: dict[str, Any] = {"seed": config.seed}
    if config.cooldown_fraction is not None:
        options["immediate_cooldown"] = False
    for name in ("cooldown_type", "cooldown_fraction", "max_warmup_fraction", "min_lr", "max_lr"):
        if (value := getattr(config, name)) is not None:
            options[name] = value
    make = AutoWU.paper if config.sched == "paper" else AutoWU
    if config.sched != "paper":
        options["model"] = model
    try:
        return make(optimizer, steps_per_epoch, config.epochs, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--sched {config.sched}: {error}") from None
