"""LARS: layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), around any optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LARS", "split_by_dimension"]


class LARS(Optimizer):
    r"""Scales every parameter's gradient by its trust ratio, then lets another optimizer take the step.

    For a parameter w with gradient g and the weight decay :math:`\lambda` of its group, the wrapped optimizer is given

    .. math::
        \frac{\text{trust\_coef} \cdot \|w\|}{\|g\| + \lambda \|w\| + \text{eps}} \; (g + \lambda w)

    in place of g (You et al. 2017, equation 6), with the ratio 1 where :math:`\|w\|` or :math:`\|g\|` is 0. The decay is applied
    here, once: the wrapped optimizer sees a decay of 0 during the step. The norms are computed in float32 or better, and nothing
    waits for the device. After a step ``.grad`` holds the scaled gradient.

    Parameter groups, state and defaults are those of the wrapped optimizer, so schedulers, state dicts and groups added later work
    as with it. A group may set its own ``"trust_coef"``; None leaves the group's gradients as they are but for the decay, as is
    usual for norms and biases (:func:`split_by_dimension`).

    Args:
        optimizer: the optimizer that takes the step, e.g. ``torch.optim.SGD`` with momentum. Not one that evaluates a closure
            several times in a step (LBFGS).
        eps: added to the denominator, 0 or more.
        trust_coef: the trust coefficient :math:`\eta`, above 0.

    Raises:
        TypeError: if `optimizer` is not an optimizer.
        ValueError: if a number is out of its range.
        RuntimeError: in `step`, for a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LARS(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4))
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, eps: float = 1e-8, trust_coef: float = 0.001) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={optimizer!r}: must be a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer: LBFGS evaluates the closure several times a step, which LARS cannot wrap")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps={eps!r}: must be at least 0 and finite")
        if not 0 < trust_coef < math.inf:
            raise ValueError(f"trust_coef={trust_coef!r}: must be above 0 and finite")
        self.__setstate__({"optim": optimizer, "eps": eps, "trust_coef": trust_coef})
        for group in optimizer.param_groups:
            self._complete(group)

    # Groups, state and defaults have one home, the wrapped optimizer, which replaces them when it loads a state.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optim.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optim.defaults

    @overload
    def step(self, closure: None = ...) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before the norms are taken.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = []
        for group in self.param_groups:
            decay = group.get("weight_decay", 0.0)
            decays.append(decay)
            self._scale_gradients(group, decay)
        try:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if decay != 0:
                    group["weight_decay"] = 0.0
            self.optim.step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if decay != 0:
                    group["weight_decay"] = decay
        return loss

    def _scale_gradients(self, group: dict[str, Any], decay: float) -> None:
        """Replace the gradients of a group by the scaled, decayed ones."""
        buckets: defaultdict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
        buckets = defaultdict(lambda: ([], []))
        for weight in group["params"]:
            grad = weight.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"LARS: a gradient of layout {grad.layout}; only dense gradients have a trust ratio")
            weights, grads = buckets[weight.device, weight.dtype]
            weights.append(weight)
            grads.append(grad)
        for weights, grads in buckets.values():
            ratios = None
            if group["trust_coef"] is not None:
                ratios = trust_ratios(weights, grads, decay, group["trust_coef"], self.eps)
            if decay != 0:
                torch._foreach_add_(grads, weights, alpha=decay)
            if ratios is not None:
                torch._foreach_mul_(grads, list(ratios.to(grads[0].dtype).unbind()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optim.add_param_group(param_group)
        self._complete(self.param_groups[-1])

    def _complete(self, group: dict[str, Any]) -> None:
        coef = group.setdefault("trust_coef", self.trust_coef)
        if coef is not None and not 0 < coef < math.inf:
            raise ValueError(f"trust_coef={coef!r}: must be above 0 and finite, or None to leave the group out")

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped optimizer, each group with its ``"trust_coef"``."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`, or of the wrapped optimizer alone."""
        self.optim.load_state_dict(state_dict)
        for group in self.param_groups:
            self._complete(group)

    def __getstate__(self) -> dict[str, Any]:
        return {"optim": self.optim, "eps": self.eps, "trust_coef": self.trust_coef}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optim: Optimizer = state["optim"]
        self.eps: float = state["eps"]
        self.trust_coef: float = state["trust_coef"]
        # Brings to life what Optimizer.__init__ would (hooks, the profiled step), without groups of its own.
        super().__setstate__({})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optim!r}, eps={self.eps:g}, trust_coef={self.trust_coef:g})"


def trust_ratios(weights: list[Tensor], grads: list[Tensor], decay: float, trust_coef: float, eps: float) -> Tensor:
    """The (k,) trust ratios of k parameters on one device, 1 where the norm of the weight or of the gradient is 0."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    weight_norm = torch.stack(torch._foreach_norm(weights, 2, dtype))
    grad_norm = torch.stack(torch._foreach_norm(grads, 2, dtype))
    ratios = trust_coef * weight_norm / (grad_norm + decay * weight_norm + eps)
    return torch.where((weight_norm > 0) & (grad_norm > 0), ratios, 1.0)


def split_by_dimension(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels with decay and adaptation; scalars and vectors (norms, biases) with neither.

    Parameters that need no gradient are left out, and so is a group that would be empty.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2))
        >>> [(len(g["params"]), g["weight_decay"]) for g in split_by_dimension(model.named_parameters(), 1e-4)]
        [(1, 0.0001), (3, 0.0)]
    """
    trainable = [p for _, p in named_parameters if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "trust_coef": None}
    return [group for group in (matrices, vectors) if group["params"]]
