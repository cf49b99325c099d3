"""What --dry-run and --eval do in the place of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from autowu.phases import first_switch
from autowu.scheduler import AutoWU
from autowu.training.build import Parts, build
from autowu.training.checkpoints import load_model
from autowu.training.config import TrainConfig
from autowu.training.console import headline
from autowu.training.data import Data
from autowu.training.evaluation import evaluate
from autowu.training.process import Process

__all__ = ["plan", "without_training"]


def without_training(config: TrainConfig, process: Process, data: Data) -> dict[str, Any]:
    """Print the plan of the run that `config` asks for, or how good the model in a checkpoint is; the latter's numbers.

    Raises:
        UsageError: if something in `config` cannot be, or the checkpoint cannot be loaded.
    """
    if isinstance(config.cooldown_fraction, list):  # what is trained first
        config = replace(config, cooldown_fraction=min(config.cooldown_fraction))
    if config.eval is not None:  # a checkpoint that is read whole
        config = replace(config, fsdp=False)
    parts, loaders = build(config, process, data)
    numbers: dict[str, Any] = {}
    if config.eval is not None:
        load_model(config.eval, parts.tested)
        with closing(loaders):
            loss, accuracy = evaluate(parts, loaders.test, process)
        numbers = {"test_loss": loss, "test_accuracy": accuracy}
        lines = [f"{config.eval}: test accuracy {accuracy:.2%}  test loss {loss:.4f}"]
    else:
        lines = [
            headline(config, process, parts.model, len(loaders.train)),
            *plan(config, process, parts, data, len(loaders.train)),
        ]
    if process.is_main:
        print("\n".join(lines), flush=True)
    return numbers


def plan(config: TrainConfig, process: Process, parts: Parts, data: Data, steps_per_epoch: int) -> Iterator[str]:
    """The lines of a plan. The optimizer takes a step with gradients of 0, to learn what it keeps: `parts` train no longer."""
    images = steps_per_epoch * config.step_size * process.world_size
    steps = f"{config.epochs * steps_per_epoch} steps" if config.max_time is None else f"{config.max_time:g} minutes"
    yield f"  {steps}; {images} of {data.num_train} images an epoch"
    if parts.autowu is not None:
        yield from _schedule(parts.autowu, process)
    model = sum(t.nbytes for t in [*parts.model.parameters(), *parts.model.buffers()])
    copy = model + _optimizer_bytes(parts)
    own = copy / process.world_size if parts.fsdp else copy
    copies = 0
    if parts.autowu is not None and parts.autowu.config.rollback:
        copies = 2
        yield f"  copies to go back to: up to 2 of {_size(own)} in the warm-up, and 1 after it, on each process"
    held = 0 if config.small_checkpoints else min(copies, 1)
    saved = copy * (1 + held) + (0 if parts.ema is None else model)
    yield f"  checkpoints of about {_size(saved)}: the last {config.checkpoint_hist} and the best, in {config.run_dir}"


def _schedule(scheduler: AutoWU, process: Process) -> Iterator[str]:
    config = scheduler.config
    total, start = config.total_steps, config.cooldown_start
    if total is None or start is None:  # of a run of so many minutes the steps are not known yet
        yield f"  warm-up from LR {config.min_lr:.4g} towards {config.max_lr:.4g}"
        yield f"  cooldown ({config.cooldown_type}) over the last {config.cooldown_fraction:.0%} of the time"
        return
    share = config.warmup_limit / total
    yield (
        f"  warm-up from LR {config.min_lr:.4g} towards {config.max_lr:.4g}, which step {config.warmup_steps} would have; "
        f"it ends at step {config.warmup_limit} ({share:.0%}) at the latest"
    )
    earliest = first_switch(config, alone=process.world_size == 1)
    tests = -(-config.warmup_limit // config.test_interval)
    yield f"  tests every {config.test_interval} steps, {tests} at most; a switch at step {earliest} at the earliest"
    if config.immediate_cooldown:
        yield f"  cooldown ({config.cooldown_type}) from the switch on"
    else:
        yield f"  peak LR up to step {start}, then cooldown ({config.cooldown_type}) over {total - start} steps"


def _optimizer_bytes(parts: Parts) -> int:
    for parameter in parts.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    parts.optimizer.step()
    values = [value for state in parts.optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
