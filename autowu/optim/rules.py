"""Rules: what a layer-wise optimizer does to a parameter, each written once, in torch's multi-tensor operations.

These are the reference. An engine may run a rule by kernels of its own, which tests hold to what stands here.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from autowu.optim.batches import Batch

N = TypeVar("N", bound=Any)


class LarsNumbers(NamedTuple):
    """What LARS takes beside tensors; the last four only where the step that follows is that of torch's SGD."""

    coef: float | Tensor
    eps: float
    max_norm: float
    weight_decay: float
    maximize: bool
    adapt: bool
    lr: float | Tensor = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


class LambNumbers(NamedTuple):
    """What LAMB takes beside tensors."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_trust_ratio: float
    bias_correction: bool
    adapt: bool


class Direction(NamedTuple):
    """Where a step goes."""

    updates: list[Tensor]
    """Of k parameters, to be scaled by LR and trust ratio and added to the weights."""
    share: float = 1.0
    """Of the step."""


class Rule(Generic[N]):
    """How much a parameter's gradient or update is scaled, given numbers N."""

    name: ClassVar[str]
    """By which engines know it."""
    alike: ClassVar[int] = 2
    """How many columns of a batch lie in memory as the parameters do: themselves, the gradients, the moments."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):  # an inherited one would have engines run the rule that it derives from
            raise TypeError(
                f"{cls.__name__}: a rule needs a `name` of its own; that of another only if engines may run it as that one"
            )

    def ratio(self, weight: Any, other: Any, numbers: N) -> Any:
        """The trust ratio for norms above 0 of a weight and of its gradient or update: floats, or (k,) tensors."""
        raise NotImplementedError

    def trust_ratio(self, weight: Any, other: Any, numbers: N) -> Any:
        """The trust ratio for any norms: 1 where one is 0 or not a number."""
        if isinstance(weight, Tensor):
            return torch.where((weight > 0) & (other > 0), self.ratio(weight, other, numbers), 1.0)
        return float(self.ratio(weight, other, numbers)) if weight > 0 and other > 0 else 1.0


class Lars(Rule[LarsNumbers]):
    """LARS: decays and scales the gradient for another optimizer, whose step follows."""

    name = "lars"

    def ratio(self, weight: Any, other: Any, numbers: LarsNumbers) -> Any:
        weight, other = at_most(weight, numbers.max_norm), at_most(other, numbers.max_norm)
        return numbers.coef * weight / (other + numbers.weight_decay * weight + numbers.eps)

    def decay_(self, piece: Batch, numbers: LarsNumbers) -> None:
        """Add the decay to the gradients, before they are scaled."""
        weights, grads = piece.columns
        if (decay := numbers.weight_decay) != 0:
            torch._foreach_add_(grads, weights, alpha=-decay if numbers.maximize else decay)


class StepRule(Rule[N]):
    """A rule that takes the whole step, and keeps a state for each parameter. Numbers have `lr` and `adapt`."""

    name = ""  # of no rule: each below has its own
    kind: ClassVar[type[Any]]
    """Of the numbers."""
    keys: ClassVar[tuple[str, ...]]
    """Of the state, in the order of the columns that follow parameters and gradients."""

    def takes(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether it steps a parameter of a group; the last rule of an optimizer is not asked, and takes what the others leave."""
        return True

    def numbers(self, group: dict[str, Any]) -> N:
        """What the rule takes of a group: by default what has the names of the numbers."""
        numbers: N = self.kind(**{name: group[name] for name in self.kind._fields})
        return numbers

    def init(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step: steps are counted from 0, and all else is zeros like the parameter."""
        counted = {"step": torch.zeros((), dtype=torch.float32, device=step_device(group, param))} if "step" in self.keys else {}
        zeros = {key: torch.zeros_like(param, memory_format=torch.preserve_format) for key in self.keys if key != "step"}
        return counted | zeros

    def update(self, piece: Batch, numbers: N) -> list[Direction]:
        """Advance the state; the directions of the step, of which the ratios are taken."""
        raise NotImplementedError

    def ratio(self, weight: Any, other: Any, numbers: N) -> Any:
        return at_most(weight / other, numbers.max_trust_ratio)


class Lamb(StepRule[LambNumbers]):
    """LAMB: Adam's update with its decay, scaled. Without ratios it is AdamW."""

    name = "lamb"
    scales: ClassVar[bool] = True
    alike = 4
    kind = LambNumbers
    keys = ("exp_avg", "exp_avg_sq", "step")

    def numbers(self, group: dict[str, Any]) -> LambNumbers:
        beta1, beta2 = group["betas"]
        return LambNumbers(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            max_trust_ratio=group["max_trust_ratio"],
            bias_correction=group.get("bias_correction", True),
            adapt=group["adapt"] and self.scales,
        )

    def update(self, piece: Batch, numbers: LambNumbers) -> list[Direction]:
        weights, grads, firsts, seconds, steps = piece.columns
        torch._foreach_add_(steps, 1)
        updates = self.adam(grads, firsts, seconds, steps, numbers)
        return [Direction(decayed_(updates, weights, numbers.weight_decay))]

    def adam(
        self, grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], steps: list[Tensor], numbers: LambNumbers
    ) -> list[Tensor]:
        """Adam's moments advanced and its updates, negated."""
        counts = torch.stack(steps) if numbers.bias_correction else None
        roots = adam_roots(grads, firsts, seconds, counts, numbers)
        correct_firsts_(roots, counts, numbers)
        return list(torch._foreach_neg(torch._foreach_div(firsts, roots)))


class AdamW(Lamb):
    """AdamW: LAMB without ratios, whatever the group says. Engines run it as such."""

    name = "lamb"
    scales = False


def decayed_(updates: list[Tensor], weights: list[Tensor], decay: float) -> list[Tensor]:
    """Updates that will be added to the weights, with the decay."""
    if decay != 0:
        torch._foreach_add_(updates, weights, alpha=-decay)
    return updates


def adam_roots(
    grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], counts: Tensor | None, numbers: LambNumbers
) -> list[Tensor]:
    """Adam's moments advanced, and the denominators of its updates: roots of the second moments, plus eps.

    `counts` are the (k,) steps taken, from which the moments are corrected; None corrects nothing.
    """
    torch._foreach_lerp_(firsts, grads, 1 - numbers.beta1)
    torch._foreach_mul_(seconds, numbers.beta2)
    torch._foreach_addcmul_(seconds, grads, grads, 1 - numbers.beta2)
    roots = list(torch._foreach_sqrt(seconds))
    if counts is not None:
        torch._foreach_div_(roots, list((1 - numbers.beta2**counts).sqrt().to(roots[0].dtype).unbind()))
    torch._foreach_add_(roots, numbers.eps)
    return roots


def correct_firsts_(roots: list[Tensor], counts: Tensor | None, numbers: LambNumbers) -> None:
    """Multiply denominators by what corrects the first moments that will be divided by them."""
    if counts is not None:
        torch._foreach_mul_(roots, list((1 - numbers.beta1**counts).to(roots[0].dtype).unbind()))


def at_most(number: Any, cap: float) -> Any:
    """A float or tensor, or what it may be at most."""
    return number.clamp(max=cap) if isinstance(number, Tensor) else min(number, cap)


def step_device(group: dict[str, Any], param: Tensor) -> torch.device:
    """Where the steps of a parameter are counted: on the device if the kernel does or a CUDA graph must, else on the host."""
    return param.device if group["capturable"] or has_fused_adam(param) else torch.device("cpu")


def has_fused_adam(tensor: Tensor) -> bool:
    """Whether torch has a fused kernel of Adam for it."""
    return tensor.is_floating_point() and (tensor.is_cuda or (tensor.is_cpu and tensor.dtype in (torch.float32, torch.float64)))


LARS_RULE: Final = Lars()
LAMB_RULE: Final = Lamb()
ADAMW_RULE: Final = AdamW()
