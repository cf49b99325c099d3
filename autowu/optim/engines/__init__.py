"""Engines: ways to run a rule on a batch. Each says which rules and batches it takes.

An engine is a module with ``takes(rule, batch)`` and ``step(rule, batch, numbers)``: the step is taken, and norms and ratios come
back. What none takes runs by the reference, :mod:`~autowu.optim.engines.eager`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from autowu.optim.batches import Batch, LayerNorms
from autowu.optim.engines import cpu, cpu_loops, gpu
from autowu.optim.rules import Rule

__all__ = ["Engine", "pick"]


class Engine(Protocol):
    """What runs a step of rules on batches."""

    def takes(self, rule: Rule[Any], batch: Batch) -> bool:
        """Whether it has kernels of a rule that do right by a batch."""

    def step(self, rule: Rule[Any], batch: Batch, numbers: Any) -> list[LayerNorms]:
        """Take a step of a rule; norms and ratios of what adapts."""


def pick(rule: Rule[Any], batch: Batch, one_by_one: bool, at_once: bool) -> Engine | None:
    """The engine with kernels for a batch, where its parameters may be stepped one by one or at once; None if there is none."""
    if one_by_one:
        host: Engine = cpu_loops if torch.compiler.is_compiling() else cpu
        if host.takes(rule, batch):
            return host
    return gpu if at_once and gpu.takes(rule, batch) else None
