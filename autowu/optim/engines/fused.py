"""Torch's fused kernel of Adam, as the engines use it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autowu.optim.rules import Lamb, LambNumbers


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    counts: list[Tensor],
    numbers: LambNumbers,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """A step of AdamW; `counts` as of :func:`counts`."""
    torch._fused_adamw_(
        params,
        grads,
        firsts,
        seconds,
        [],
        counts,
        lr=lr,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        weight_decay=weight_decay,
        eps=numbers.eps,
        amsgrad=False,
        maximize=False,
    )


def counts(steps: list[Tensor], numbers: LambNumbers) -> list[Tensor]:
    """The steps taken, for the kernel: it corrects nothing after endless ones."""
    return steps if numbers.bias_correction else [torch.full_like(step, math.inf) for step in steps]


class FusedLamb(Lamb):
    """LAMB whose update is made by the kernel."""

    name = "lamb"

    def adam(
        self, grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], steps: list[Tensor], numbers: LambNumbers
    ) -> list[Tensor]:
        updates = [torch.zeros_like(first) for first in firsts]  # at an LR of 1 they become the updates, negated
        adamw_(updates, grads, firsts, seconds, counts(steps, numbers), numbers, lr=1.0, weight_decay=0.0)
        return updates
