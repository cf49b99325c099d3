"""State: was the optimizer called since the last step? The one place that knows torch's private flag.

Torch's schedulers have the optimizer set a flag when it is called. It is marked as read here; a step hook sets it too, which also
sees the calls of a method that was held from before torch wrapped it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autowu.events import EventLog
from autowu.kin import chain, family_of, parts, several

__all__ = ["OptimizerCalls"]

_MANY: Final = 3
"""Calls of the optimizer for one of the scheduler, that often in a row, that are no wrapper's."""
_SKIPPED: Final = 100
"""Calls of the scheduler without one of the optimizer that are told: in a row, or where gradients overflow."""
_SELDOM: Final = 20
"""Steps for each call without one of the optimizer that a GradScaler may take which tries a higher scale now and then."""
_READ: Final = 1
"""Put for True into torch's flag: true as well, and known to have been seen."""


class OptimizerCalls:
    """Follows the calls of an optimizer.

    Attributes:
        skipped: steps in a row, up to now, for which it was not called.
    """

    def __init__(self, optimizer: Optimizer, log: EventLog) -> None:
        self.skipped = 0
        self._hooked, self._log = [optimizer, *_inside(optimizer)], log
        self._parts = found if len(found := parts(optimizer)) > 1 else []  # of one that steps several
        for part in self._parts:
            _Flag(part)
        self._hooks = [_Calls() for _ in self._hooked]
        self._sees_calls = False  # after a step that trained something
        self._sees_past_wrapper = False
        self._crowded = 0  # steps in a row for which the optimizer was called many times
        self._overflows, self._since = 0, -1  # calls without one of the optimizer since that step
        self._hook()

    def took_step(self, optimizer: Optimizer, step: int) -> bool:
        """Whether `step` is one: the optimizer was called since the last time that this was asked."""
        calls = 0
        for hook in self._hooks:
            if number := hook.number:
                hook.number = 0
                if number > calls:
                    calls = number
        if calls >= _MANY or self._crowded:
            self._tell_of_many(calls, step)
        is_wrapped = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        if self._parts:
            calls = max(calls, _read(self._parts))
            is_wrapped = all(hasattr(part.step, "_wrapped_by_lr_sched") for part in self._parts)
        if calls or getattr(optimizer, "_opt_called", False) is True:
            optimizer._opt_called = _READ  # type: ignore[attr-defined]
            if not self._sees_calls:
                self._sees_calls = self._has_trained(optimizer)
            if not is_wrapped:
                self._sees_past_wrapper = True
        elif self._means_something(optimizer, step, is_wrapped):
            self.skipped += 1
            self._overflows += 1
            if self._overflows == 1:
                self._since = step
            if self.skipped == _SKIPPED or self._overflows == _SKIPPED:
                self._tell_of_skips(optimizer, step)
            return False
        self.skipped = 0
        return True

    def _has_trained(self, optimizer: Optimizer) -> bool:
        """Whether there is a state or a gradient. Asked at each step until there is, so it looks no further than it must."""
        for hooked in self._hooked:
            if hooked.state:
                return True
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    return True
        return False

    def _tell_of_skips(self, optimizer: Optimizer, step: int) -> None:
        """Warn where a scaler halves its scale on and on: at 0 it makes NaN of all gradients, and lets them pass."""
        taken, told = step - self._since, ""
        if self.skipped == _SKIPPED:
            told = f"{_SKIPPED} steps in a row without a call of the optimizer"
        elif taken < _SELDOM * _SKIPPED and not _are_finite(_gradients(optimizer)):  # else a wrapper calls several times
            told = f"the optimizer was not called for {_SKIPPED} of {taken + _SKIPPED} steps"
        if told:
            cause = "if a GradScaler skips, its gradients overflow, and its scale falls to 0, which makes NaN of them"
            cure = "look for the layer that overflows, or use bfloat16; scaler.update(2.0**16) gives the scale back"
            self._log.warn_once("skipped", step, f"{told}; {cause}: {cure}")
        self._overflows = 0

    def _tell_of_many(self, calls: int, step: int) -> None:
        """Warn where the optimizer is called many times for each call of the scheduler."""
        self._crowded = self._crowded + 1 if calls >= _MANY else 0
        if self._crowded == _MANY:
            cure = 'call scheduler.step(loss) after every optimizer.step (in Lightning with "interval": "step")'
            self._log.warn_once("calls", step, f"the optimizer was called {calls} times for one step of the scheduler; {cure}")

    def _means_something(self, optimizer: Optimizer, step: int, is_wrapped: bool) -> bool:
        """Whether the absence of the flag does: whether the optimizer skipped a step.

        Nothing follows from it before a step was seen that trained something: the optimizer may have been called past the flag, the
        two calls may stand in the order that torch warns about, or the losses are those of another run. What a GradScaler skips in
        the first steps shows in the gradients; only there they are read.
        """
        if not is_wrapped and not self._sees_past_wrapper:
            if self._sees_calls:
                message = "optimizer.step was replaced; from here on every call counts, skipped steps too"
                self._log.once("optimizer", step, message)
            return False
        if self._sees_calls:
            return True
        return not _are_finite(_gradients(optimizer))

    def _hook(self) -> bool:
        seen = False
        for hooked, hook in zip(self._hooked, self._hooks, strict=True):
            with contextlib.suppress(AttributeError):  # some optimizers skip the constructor that makes room for hooks
                hooked.register_step_post_hook(hook)
                seen = True
        return seen

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The copy of an optimizer has neither wrapper nor hook.
        self._sees_past_wrapper = self._hook()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]


def _inside(optimizer: Optimizer) -> list[Optimizer]:
    """What it steps: the steps of SAM are those of its inner one. Not what LARS wraps: a hook would cost that its kernels."""
    found = [inner for outer, inner in pairwise(chain(optimizer)) if family_of(type(outer)) != "lars"]
    for one in (one for each in chain(optimizer) for one in several(each)):
        found += [one, *_inside(one)]
    return found


def _read(optimizers: list[Optimizer]) -> bool:
    """Whether any of `optimizers` bears torch's flag, which is marked as read."""
    called = [optimizer for optimizer in optimizers if getattr(optimizer, "_opt_called", False) is True]
    for optimizer in called:
        optimizer._opt_called = _READ  # type: ignore[attr-defined]
    return bool(called)


class _Flag(LRScheduler):
    """Has torch set the flag of an optimizer that this one's scheduler does not have itself; it sets no LR."""

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _are_finite(gradients: list[Tensor]) -> bool:
    return all((g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in gradients)


class _Calls:
    """Step hook of the optimizer: counts its calls, and sets the flag of torch's schedulers."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.number += 1
        if not torch.compiler.is_compiling():  # torch 2.11 cannot trace it, and the number says as much
            optimizer._opt_called = True  # type: ignore[attr-defined]
