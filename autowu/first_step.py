"""State: by how much the first optimizer step moves the weights, which tells where the LR range of SGD is far off.

A loss that is summed, or of large targets, has gradients so large that the lowest LR of the range is too high; one that is scaled
down, so small that the highest is too low. Optimizers of other families scale their updates themselves.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autowu.config import Config
from autowu.events import EventLog, range_message
from autowu.families import family
from autowu.kin import chain
from autowu.plans import widened
from autowu.ranks import Ranks
from autowu.rollback import NoRollback

__all__ = ["FirstStep"]

_USUAL: Final = 1e-5
"""Of the weights' norm, what the first step at `min_lr` moves them by; from 1e-6.2 to 1e-3.2 in runs whose range is right."""
_MOST: Final = 2e-3
_LEAST: Final = 1e-7
"""Shares between which the range stays as it is."""


class FirstStep:
    """Watches the first step of a run whose LR range follows from the optimizer's family, and widens that where it is far off.

    Args:
        config: of the run.
        arguments: of the scheduler, checked.
        rollback: which copies the run before the step.

    Attributes:
        asks: whether it looks at the step that is to come.
    """

    def __init__(self, config: Config, arguments: Mapping[str, Any], rollback: NoRollback, ranks: Ranks, log: EventLog) -> None:
        self._rollback, self._ranks, self._log = rollback, ranks, log
        self._optimizer: Optimizer = arguments["optimizer"]
        self._given, self._min_lr = arguments["peak_factor"], config.min_lr
        follows = arguments["min_lr"] is None and arguments["max_lr"] is None and config.warmup_origin == 0
        follows = follows and config.warmup_type != "linear"  # which knows no decades
        self.asks = follows and config.rollback and config.watch and family(self._optimizer) == "sgd"
        self._armed = self.asks
        self._moved: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        for optimizer in chain(self._optimizer) if self.asks else ():  # of which some step past the outer one
            with contextlib.suppress(AttributeError):  # some optimizers skip the constructor that makes room for hooks
                self._handles.append(optimizer.register_step_pre_hook(_hook(self, FirstStep.before)))
                self._handles.append(optimizer.register_step_post_hook(_hook(self, FirstStep.after)))

    def before(self) -> None:
        """Copy the run before its first step, unless that is recorded, to be replayed, or its LR was set from outside."""
        if self._armed:
            self._armed = False
            lr = max((float(group["lr"]) for group in self._optimizer.param_groups), default=math.inf)
            if lr <= 2 * self._min_lr and not _is_recorded(self._optimizer):
                self._rollback.take(0, 0.0, 0.0, 1.0)

    def after(self) -> None:
        """See what the step has moved, before anybody else moves the weights."""
        if self.asks and not self._armed and self._moved is None:
            self._moved = self._rollback.moved(0)

    def forget(self) -> None:
        """The run is past its first step."""
        self.asks = self._armed = False
        for handle in self._handles:
            handle.remove()
        self._handles, self._moved = [], None

    def go_on(self, step: int) -> None:
        """A state of `step` was loaded: the run is past its first step, or that is still to come."""
        if step:
            self.forget()
        self._moved, self._armed = None, self.asks

    def plan(self, config: Config) -> Config:
        """The plan of a run that has taken its first step: with another LR range, the step undone, where it moved far too much.

        Waits for the device.
        """
        if not self.asks:
            return config
        share = self._share()
        self.forget()
        is_far = _MOST < share < math.inf or (0 < share < _LEAST and self._is_fine())
        if not is_far:
            self._rollback.free()
            return config
        after = widened(config, self._given, self._optimizer, 10 ** round(math.log10(_USUAL / share), 1))
        restored = self._rollback.put_back(1) if share > _MOST else None
        self._rollback.free()
        self._log.tell("range", 1, range_message(config, after, share, None if restored is None else restored.step))
        return after

    def _share(self) -> float:
        """By how much of their norm the weights of all ranks have moved; NaN where one does not know. Waits for the device."""
        by, norm, unknown = 0.0, 0.0, float(self._moved is None)
        if self._moved is not None:
            by, norm = self._moved.cpu().double().square().sum(0).tolist()
        by, norm, unknown = self._ranks.sum(torch.tensor([by, norm, unknown], dtype=torch.float64)).tolist()
        return math.sqrt(by / norm) if norm and not unknown else math.nan

    def _is_fine(self) -> bool:
        """Whether weights are held in so many digits, on all ranks, that a small step shows."""
        own = all(p.element_size() >= 4 for group in self._optimizer.param_groups for p in group["params"])
        return self._ranks.all_agree(torch.tensor([float(own)], dtype=torch.float64))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_handles": [], "_armed": False}  # the copy of an optimizer has no hook


def _hook(first_step: FirstStep, act: Callable[[FirstStep], None]) -> Callable[[Optimizer, Any, Any], None]:
    """Step hook of the optimizer, which must not keep alive what a scheduler that is gone has claimed."""
    held = weakref.ref(first_step)

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and (first := held()) is not None:
            act(first)

    return hook


def _is_recorded(optimizer: Optimizer) -> bool:
    """Whether a CUDA graph is being made of what `optimizer` does."""
    on_gpu = any(p.is_cuda for group in optimizer.param_groups for p in group["params"][:1])
    return on_gpu and torch.cuda.is_current_stream_capturing()
