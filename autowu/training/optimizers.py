"""Optimizer and scheduler by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from autowu.families import family
from autowu.optim import LAMB, LARS, TVLARS, param_groups
from autowu.scheduler import AutoWU
from autowu.schedules import cooldown_factor
from autowu.training.config import TrainConfig, UsageError, unknown_name

__all__ = ["HAND_SET_LR", "build_optimizer", "build_scheduler"]

HAND_SET_LR = {"sgd": 0.1, "adam": 1e-3, "lars": 3.0, "lamb": 1e-2, "unknown": 1e-3}
"""Peak LR of ``--sched cosine`` where none is given, by the optimizer's family."""

_OURS = ("lars", "lamb", "tvlars")
_WARMUP_FRACTION = 0.05


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer `config.opt` over the parameters of `model`; norms and biases without decay and adaptation.

    Raises:
        UsageError: if there is no such optimizer.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if config.opt.lower() in _OURS:
        try:
            return _with_scaled_lrs(_build_ours(config.opt.lower(), config, model))
        except (TypeError, ValueError) as error:
            raise UsageError(f"--opt {config.opt}: cannot be built: {error}") from None
    if config.opt.lower().removeprefix("lookahead_") not in list_optimizers():
        raise unknown_name("--opt", config.opt, [*_OURS, *list_optimizers()])
    more: dict[str, Any] = {"layer_decay": config.layer_decay} | (config.opt_kwargs or {})
    try:
        # The first is made to learn its family, which the LR depends on.
        optimizer: Optimizer = create_optimizer_v2(model, config.opt, 1e-3, config.weight_decay, config.momentum, **more)
        lr = config.lr or HAND_SET_LR[family(optimizer)]
        optimizer = create_optimizer_v2(model, config.opt, lr, config.weight_decay, config.momentum, **more)
    except Exception as error:  # an optional package that is not installed, arguments that it does not take
        raise UsageError(f"--opt {config.opt}: cannot be built: {error or type(error).__name__}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"--opt {config.opt}: needs second derivatives, which train.py does not compute")
    return _with_scaled_lrs(optimizer)


def _with_scaled_lrs(optimizer: Optimizer) -> Optimizer:
    """Make the share of the LR that timm has written to a group its own LR, which every scheduler keeps the ratio of."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


def _build_ours(name: str, config: TrainConfig, model: nn.Module) -> Optimizer:
    groups = _groups(config, model)
    lr = config.lr or HAND_SET_LR["lamb" if name == "lamb" else "lars"]
    more = config.opt_kwargs or {}
    if name == "lamb":
        return LAMB(groups, lr, **more)
    if name == "tvlars":
        return TVLARS(groups, lr, config.momentum, **more)
    return LARS(SGD(groups, lr, config.momentum), **more)


def _groups(config: TrainConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The groups of our optimizers; with layer decay one a layer of timm's and kind."""
    groups = param_groups(model, config.weight_decay)
    if config.layer_decay is None:
        return groups
    from timm.optim import param_groups_layer_decay

    layers = param_groups_layer_decay(model, layer_decay=config.layer_decay)
    scales = {parameter: layer["lr_scale"] for layer in layers for parameter in layer["params"]}
    split: dict[tuple[bool, float], dict[str, Any]] = {}
    for group in groups:
        for parameter, name in zip(group["params"], group["param_names"], strict=True):
            scale = scales[parameter]
            own = split.setdefault((group["adapt"], scale), {**group, "params": [], "param_names": [], "lr_scale": scale})
            own["params"].append(parameter)
            own["param_names"].append(name)
    return list(split.values())


def build_scheduler(
    config: TrainConfig,
    model: nn.Module,
    optimizer: Optimizer,
    steps_per_epoch: int,
    on_rollback: Callable[[int], object] | None = None,
) -> LRScheduler:
    """The scheduler `config.sched` of a run of `model`, stepped once an optimizer step.

    `on_rollback` is called with the step after AutoWU has put back a copy of the model.

    Raises:
        UsageError: if AutoWU does not take its options.
    """
    if config.sched in ("cosine", "poly"):
        return _hand_set(config, optimizer, steps_per_epoch)
    options: dict[str, Any] = {"seed": config.seed}
    if config.cooldown_fraction is not None:
        options["immediate_cooldown"] = False
    for name in ("cooldown_type", "cooldown_fraction", "max_warmup_fraction", "min_lr", "max_lr"):
        if (value := getattr(config, name)) is not None:
            options[name] = value
    if config.stop_at_plateau:
        options["cooldown"] = "auto"
    length: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "total_epochs": config.epochs}
    if config.max_time is not None:
        length = {"total_seconds": 60 * config.max_time}
    make = AutoWU.paper if config.sched == "paper" else AutoWU
    if config.sched != "paper":
        options |= {"model": model, "on_rollback": on_rollback}
    try:
        return make(optimizer, **length, **options)
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"--sched {config.sched}: {error}") from None


def _hand_set(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> LRScheduler:
    """A linear warm-up to the LR that is given, then a cosine, or the square of a line, down to 0."""
    total = config.epochs * steps_per_epoch
    epochs = _WARMUP_FRACTION * config.epochs if config.warmup_epochs is None else config.warmup_epochs
    warmup = max(1, round(min(epochs, config.epochs) * steps_per_epoch))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (min(step, total - 1) - warmup) / max(1, total - warmup)
        return cooldown_factor(done) if config.sched == "cosine" else (1 - done) ** 2

    return LambdaLR(optimizer, factor)
