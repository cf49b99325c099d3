"""State: was the optimizer called since the last step? The one place that knows torch's private flag.

Torch's schedulers have the optimizer set a flag when it is called. It is marked as read here; a step hook sets it too, which also
sees the calls of a method that was held from before torch wrapped it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer

from autowu.events import EventLog
from autowu.kin import chain, family_of

__all__ = ["OptimizerCalls"]

_READ: Final = 1
"""Put for True into torch's flag: true as well, and known to have been seen."""


class OptimizerCalls:
    """Follows the calls of an optimizer.

    Attributes:
        skipped: steps in a row, up to now, for which it was not called.
    """

    def __init__(self, optimizer: Optimizer, log: EventLog) -> None:
        self.skipped = 0
        # With what it wraps: the steps of SAM are those of its inner one. Not what LARS wraps: a hook would cost that its kernels.
        wrappers = chain(optimizer)
        inside = [inner for outer, inner in pairwise(wrappers) if family_of(type(outer)) != "lars"]
        self._hooked = [optimizer, *inside]
        self._log = log
        self._sees_calls = False  # after a step that trained something
        self._sees_past_wrapper = False
        self._hook()

    def took_step(self, optimizer: Optimizer, step: int) -> bool:
        """Whether `step` is one: the optimizer was called since the last time that this was asked."""
        is_wrapped = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        called = [hooked for hooked in (optimizer, *self._hooked[1:]) if getattr(hooked, "_opt_called", False) is True]
        if called:
            for hooked in (optimizer, *called):  # torch asks the outer one
                hooked._opt_called = _READ  # type: ignore[attr-defined]
            if not self._sees_calls:
                self._sees_calls = any(hooked.state for hooked in self._hooked) or bool(_gradients(optimizer))
            if not is_wrapped:
                self._sees_past_wrapper = True
        elif self._means_something(optimizer, step, is_wrapped):
            self.skipped += 1
            return False
        self.skipped = 0
        return True

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
        return any(not (g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in _gradients(optimizer))

    def _hook(self) -> bool:
        seen = False
        for hooked in self._hooked:
            with contextlib.suppress(AttributeError):  # some optimizers skip the constructor that makes room for hooks
                hooked.register_step_post_hook(_note_call)
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


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _note_call(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Step hook of the optimizer: set the flag of torch's schedulers."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
