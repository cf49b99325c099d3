"""Whole steps on the CPU: a parameter at a time, while the cache has it, by torch's fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from autowu.optim.batches import Batch, LayerNorms, dense_norm, note_writes, same_layout
from autowu.optim.checks import LARGEST
from autowu.optim.engines import fused
from autowu.optim.rules import LAMB_RULE, LARS_RULE, LambNumbers, LarsNumbers, Rule, at_most

_SMALL: Final = 1e-6
"""Of a ratio below this, 1 - ratio would not keep what float32 can."""


class Passes:
    """What is made of whole tensors before their ratio is known. Each returns two norms."""

    def norms(self, weight: Tensor, grad: Tensor) -> tuple[float, float]:
        """Norms of a weight and of its gradient."""
        return dense_norm(weight), dense_norm(grad)

    def lamb_update(
        self, weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, update: Tensor, count: Tensor, numbers: LambNumbers
    ) -> tuple[float, float]:
        """Advance the moments and leave LAMB's update, negated, in `update`; norms of the weight and of the update.

        `count` are the steps taken, or infinity, after which nothing is corrected.
        """
        torch.mul(weight, -numbers.weight_decay, out=update)
        weight_norm = dense_norm(weight)  # here, while the cache has it
        # Adam's kernel makes the update, negated, of weights of 0 at an LR of 1; the decay lies there already.
        fused.adamw_([update], [grad], [first], [second], [count], numbers, lr=1.0, weight_decay=0.0)
        return weight_norm, dense_norm(update)


def takes(rule: Rule[Any], batch: Batch) -> bool:
    """Whether torch's fused kernels do right by a batch; not in half precision, for one."""
    rows = zip(*batch.columns[: rule.alike], strict=True)
    return rule.name in STEPS and batch.sharding is None and all(_has_kernel(*row) for row in rows)


def _has_kernel(param: Tensor, *others: Tensor) -> bool:
    plain = type(param) in (Parameter, Tensor) and param.is_cpu and param.dtype in (torch.float32, torch.float64)
    return plain and same_layout(param, *others)


def step(rule: Rule[Any], batch: Batch, numbers: Any) -> list[LayerNorms]:
    """Take a step of a rule; norms and ratios of what adapts."""
    note_writes(batch.params)
    norms = STEPS[rule.name](batch.columns, numbers, Passes())
    return [LayerNorms(batch.params, norms)] if numbers.adapt else []


def lars_sgd(columns: list[list[Any]], numbers: LarsNumbers, passes: Passes) -> Tensor:
    """A step of torch.optim.SGD on the gradients that LARS gives it.

    Args:
        columns: k parameters, k gradients, k momentum buffers or none without momentum, and of each buffer whether it holds
            nothing yet: zeros.
        numbers: of LARS and of SGD.
        passes: how norms are made.

    Returns:
        (3, k) weight norms, gradient norms and trust ratios, or (3, 0) without ratios.
    """
    params, grads, buffers, fresh = columns
    numbers = numbers._replace(lr=float(numbers.lr), coef=float(numbers.coef))
    rows: list[tuple[float, float, float]] = []
    if not numbers.adapt and not any(fresh):
        torch._fused_sgd_(params, grads, buffers, **_plain(numbers), is_first_step=False)
        return _columns(rows)
    scaled = _ScaledSgd(numbers)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        ratio = 1.0
        if numbers.adapt:
            weight_norm, grad_norm = passes.norms(param, grad)
            ratio = LARS_RULE.trust_ratio(weight_norm, grad_norm, numbers)
            rows.append((weight_norm, grad_norm, ratio))
        scaled.step(param, grad, buffers[i : i + 1], bool(fresh) and fresh[i], ratio)
    return _columns(rows)


def _plain(numbers: LarsNumbers) -> dict[str, Any]:
    """What SGD's kernel is told where nothing is scaled."""
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    return {name: getattr(numbers, name) for name in names}


class _ScaledSgd:
    """SGD's kernel on a scaled gradient, which it is told of in what costs no writing where it can be."""

    def __init__(self, numbers: LarsNumbers) -> None:
        self.numbers = numbers
        self.plain = _plain(numbers)
        self.divisor = torch.empty((), dtype=torch.float32, device="cpu")

    def step(self, param: Tensor, grad: Tensor, buffer: list[Tensor], first: bool, ratio: float) -> None:
        numbers = self.numbers
        told: dict[str, Any] = {"is_first_step": first}
        if ratio == 1:
            pass
        elif not buffer:
            told = {"lr": numbers.lr * ratio, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
        elif param.dtype != torch.float32 or (ratio < _SMALL and not numbers.nesterov):
            grad.mul_(ratio)
            told["weight_decay"] = numbers.weight_decay * ratio
        elif numbers.nesterov:
            self.divisor.fill_(1 / ratio if ratio != 0 else math.inf)
            told |= {"weight_decay": numbers.weight_decay * ratio, "dampening": 0.0, "grad_scale": self.divisor}
        else:  # what dampening leaves of the gradient is the ratio
            left = ratio if first else ratio * (1 - numbers.dampening)
            told = {"dampening": 1 - left, "is_first_step": False}
        torch._fused_sgd_([param], [grad], buffer, **(self.plain | told))


def lamb(columns: list[list[Any]], numbers: LambNumbers, passes: Passes) -> Tensor:
    """A step of LAMB, or of torch.optim.AdamW where there are no ratios.

    Args:
        columns: k parameters of one dtype, k gradients, both moments and the steps taken.
        numbers: of LAMB.
        passes: how updates and norms are made.

    Returns:
        (3, k) weight norms, update norms and trust ratios, or (3, 0) without ratios.
    """
    params, grads, firsts, seconds, steps = columns
    torch._foreach_add_(steps, 1)
    counts = fused.counts(steps, numbers)
    rate = float(numbers.lr)
    rows: list[tuple[float, float, float]] = []
    if not numbers.adapt:
        fused.adamw_(params, grads, firsts, seconds, counts, numbers, lr=rate, weight_decay=numbers.weight_decay)
        return _columns(rows)
    scratch = torch.empty(max(param.numel() for param in params), dtype=params[0].dtype, device="cpu")
    for param, grad, first, second, count in zip(params, grads, firsts, seconds, counts, strict=True):
        update = scratch.as_strided(param.size(), param.stride())
        weight_norm, update_norm = passes.lamb_update(param, grad, first, second, update, count, numbers)
        ratio = LAMB_RULE.trust_ratio(weight_norm, update_norm, numbers)
        param.add_(update, alpha=at_most(rate * ratio, LARGEST))
        rows.append((weight_norm, update_norm, ratio))
    return _columns(rows)


def _columns(rows: list[tuple[float, float, float]]) -> Tensor:
    """(3, k) numbers of k rows."""
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, 3).T.contiguous()


STEPS: Final[dict[str, Callable[..., Tensor]]] = {"lars": lars_sgd, "lamb": lamb}
"""A rule's step by its name. That of LARS is with torch's SGD."""
