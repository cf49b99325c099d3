"""The reference: rules run as they are written, of torch's operations, wherever the tensors are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from autowu.optim.batches import Batch, LayerNorms, host_norm, same_layout
from autowu.optim.checks import LARGEST
from autowu.optim.engines.fused import FusedLamb
from autowu.optim.rules import Lars, LarsNumbers, Rule, StepRule, at_most, has_fused_adam

_FUSED: Final[dict[str, StepRule[Any]]] = {"lamb": FusedLamb()}


def step(rule: StepRule[Any], piece: Batch, numbers: Any) -> list[LayerNorms]:
    """Take a step of a rule; norms and ratios of what adapts, those of the first direction."""
    if rule.name in _FUSED and _is_fusable(piece, rule.alike):
        rule = _FUSED[rule.name]
    directions = rule.update(piece, numbers)
    taken = [measure(rule, piece, direction.updates, numbers) for direction in directions] if numbers.adapt else []
    for i, direction in enumerate(directions):
        scale = numbers.lr if direction.share == 1 else numbers.lr * direction.share
        if numbers.adapt:
            scale = taken[i].values[2] * scale
        _descend(piece, direction.updates, scale, numbers.adapt)
    return taken[:1]


def _descend(piece: Batch, updates: list[Tensor], scale: Any, adapt: bool) -> None:
    weights = piece.columns[0]
    if piece.on_host():
        weights[0].add_(updates[0], alpha=at_most(float(scale), LARGEST))
        return
    if adapt:
        scale_(updates, scale)
    else:
        torch._foreach_mul_(updates, scale)
    torch._foreach_add_(weights, updates)


def adapt_gradients(rule: Lars, piece: Batch, numbers: LarsNumbers) -> list[LayerNorms]:
    """Replace gradients by what LARS gives to another optimizer; norms and ratios of what adapts."""
    grads = piece.columns[1]
    taken = [measure(rule, piece, grads, numbers)] if numbers.adapt else []
    rule.decay_(piece, numbers)
    for norms in taken:
        scale_(grads, norms.values[2])
    return taken


def measure(rule: Rule[Any], piece: Batch, others: Sequence[Tensor], numbers: Any) -> LayerNorms:
    """Norms of the weights of a piece and of what goes with each, and the trust ratios."""
    weights = piece.columns[0]
    if piece.on_host():
        weight, other = host_norm(weights[0]), host_norm(others[0])
        return LayerNorms(piece.params, (weight, other, rule.trust_ratio(weight, other, numbers)))
    norms = piece.norms([*weights, *others])
    weight_norms, other_norms = norms[: len(weights)], norms[len(weights) :]
    ratios = rule.trust_ratio(weight_norms, other_norms, numbers)
    return LayerNorms(piece.params, torch.stack((weight_norms, other_norms, ratios)))


def scale_(tensors: list[Tensor], scales: Tensor | float) -> None:
    """Multiply k tensors in place, by (k,) scales or by one."""
    if tensors[0].dtype == torch.float16:  # whose range a ratio may leave, though the product is within
        each: Sequence[Any] = scales.unbind() if isinstance(scales, Tensor) else [scales] * len(tensors)
        for tensor, scale in zip(tensors, each, strict=True):
            tensor.copy_(tensor.float().mul_(scale))
    else:
        torch._foreach_mul_(tensors, list(scales.to(tensors[0].dtype).unbind()) if isinstance(scales, Tensor) else scales)


def _is_fusable(piece: Batch, alike: int) -> bool:
    """Whether torch's fused kernel of Adam does right by a piece; a compiler needs none."""
    rows = zip(*piece.columns[:alike], strict=True)
    return not torch.compiler.is_compiling() and all(has_fused_adam(w) and same_layout(w, *others) for w, *others in rows)
