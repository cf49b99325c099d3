"""LAMB: layer-wise adaptive moments for large batches (You et al. 2020, arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from autowu.optim import _device
from autowu.optim._functional import (
    Bucket,
    LayerNorms,
    LayerStats,
    buckets,
    check_adapt,
    check_capture,
    check_dense,
    layer_stats,
    note_writes,
    pick_foreach,
    scale_,
    trust_ratios,
)
from autowu.optim._host import adamw_, at_most, counts, has_kernel, lamb_, lamb_op, same_layout

__all__ = ["LAMB"]


class LAMB(Optimizer):
    r"""AdamW whose update of every parameter is scaled to the norm of the parameter.

    With Adam's bias-corrected moments :math:`\hat m, \hat v` of a parameter w, and its weight decay :math:`\lambda`, the step is

    .. math::
        u = \frac{\hat m}{\sqrt{\hat v} + \text{eps}} + \lambda w, \qquad
        w \leftarrow w - \text{lr} \, \min\left(\frac{\|w\|}{\|u\|}, \text{max\_trust\_ratio}\right) u

    with the ratio 1 where :math:`\|w\|` or :math:`\|u\|` is 0, and in groups with ``"adapt": False``, as is usual for norms and
    biases (:func:`~autowu.optim.param_groups`): there LAMB is AdamW. The paper leaves the scaling function of the norm open; here
    the ratio itself is clamped, and ``math.inf`` takes the clamp away. Norms are computed in float32 or better, those of sharded
    parameters (DTensor, FSDP2; torch 2.5 or later) over all shards, and nothing waits for the device but the first step on a GPU
    with parameters of a dtype, which tries the kernels.

    ``torch.compile(optimizer.step)``, of torch 2.6 or later, traces one graph, on the CPU of one operator for each group; let the
    LR be a tensor, or every new LR compiles anew.

    Args:
        params: parameters or groups, named or not.
        lr: the learning rate, a float or a tensor, 0 or more: the relative change of the adapted parameters in a step.
        betas: decay of the moments, in [0, 1).
        eps: added to the denominator, above 0.
        weight_decay: :math:`\lambda`, 0 or more.
        max_trust_ratio: the ratio is at most this, above 0.
        bias_correction: correct the moments for starting from 0; False is the paper's variant for a warm-up.
        capturable: keep the step counts on the device, for CUDA graphs.
        foreach: update all parameters of a device at a time (True) or one after the other (False). By default the former, on the
            CPU the latter.

    Raises:
        ValueError: if a number is out of its range.
        RuntimeError: in `step`, for a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LAMB(model.parameters(), lr=0.01, weight_decay=0.01)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_trust_ratio: float = 10.0,
        bias_correction: bool = True,
        capturable: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._forget()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_trust_ratio": max_trust_ratio,
            "bias_correction": bias_correction,
            "adapt": True,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": False,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not set is as in the constructor."""
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

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
        check_capture("LAMB", self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken: list[LayerNorms] = []
        for group in self.param_groups:
            columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *columns)
            foreach = pick_foreach(group["foreach"], columns[0])
            for bucket in buckets(*columns):
                rows = zip(*bucket.columns[:4], strict=True)  # all but the counts
                if not foreach and bucket.sharding is None and all(has_kernel(*row) for row in rows):
                    self._update_on_the_host(group, bucket, taken)
                elif foreach and not group["capturable"] and _device.have_kernels(bucket.params, *bucket.columns[1:4]):
                    note_writes(bucket.params)
                    weights, grads, firsts, seconds, steps = bucket.columns
                    taken += _device.lamb_(weights, grads, firsts, seconds, steps, group["lr"], *_numbers(group))
                else:
                    for piece in bucket.pieces(foreach):
                        self._update(group, piece, taken)
        self._last["norms"] = taken
        return loss

    def layer_stats(self) -> list[LayerStats]:
        """Weight norm, update norm (as `grad_norm`) and trust ratio in the last step, for adapted parameters that had a gradient.

        Waits for the device, once. Empty before the first step.
        """
        return layer_stats(self.param_groups, self._last["norms"])

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        firsts: list[Tensor],
        seconds: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Append the parameters that have a gradient, and what goes with each; state that is not there yet is made."""
        for param in group["params"]:
            if param.grad is None:
                continue
            check_dense("LAMB", param.grad)
            if param.is_complex():
                raise RuntimeError("LAMB: a complex parameter; Adam's second moment of one is not defined here")
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(group, param))
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            firsts.append(state["exp_avg"])
            seconds.append(state["exp_avg_sq"])
            steps.append(state["step"])

    def _update(self, group: dict[str, Any], piece: Bucket, taken: list[LayerNorms]) -> None:
        weights, grads, firsts, seconds, steps = piece.columns
        torch._foreach_add_(steps, 1)
        columns = zip(weights, grads, firsts, seconds, strict=True)
        if not torch.compiler.is_compiling() and all(_fusable(w) and same_layout(w, *others) for w, *others in columns):
            updates = [torch.zeros_like(weight) for weight in weights]  # of which Adam's kernel makes its update, negated
            (beta1, beta2), taken_steps = group["betas"], counts(steps, group["bias_correction"])
            adamw_(updates, grads, firsts, seconds, taken_steps, 1.0, beta1, beta2, group["eps"], 0.0)
        else:
            updates = _adam(group, grads, firsts, seconds, steps)
        if (decay := group["weight_decay"]) != 0:
            torch._foreach_add_(updates, weights, alpha=-decay)
        scale: Any = group["lr"]
        if group["adapt"]:
            cap = group["max_trust_ratio"]
            taken.append(trust_ratios(piece, updates, lambda weight, update: at_most(weight / update, cap)))
            scale = taken[-1].values[2] * scale
        if piece.on_host():
            weights[0].add_(updates[0], alpha=float(scale))
        elif group["adapt"]:
            scale_(updates, scale)
            torch._foreach_add_(weights, updates)
        else:
            torch._foreach_mul_(updates, scale)
            torch._foreach_add_(weights, updates)

    def _update_on_the_host(self, group: dict[str, Any], bucket: Bucket, taken: list[LayerNorms]) -> None:
        weights, grads, firsts, seconds, steps = bucket.columns
        lr = torch.as_tensor(group["lr"], dtype=torch.float64, device="cpu")
        if torch.compiler.is_compiling():
            step: Any = lamb_op
        else:
            note_writes(bucket.params)
            step = lamb_
        norms = step(weights, grads, firsts, seconds, steps, lr, *_numbers(group))
        if group["adapt"]:
            taken.append(LayerNorms(bucket.params, norms))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for param in group["params"]:  # a checkpoint may have been read to the host
                if "step" in (own := self.state.get(param, {})):
                    own["step"] = own["step"].to(_step_device(group, param))

    def _forget(self) -> None:
        self._last: dict[str, list[LayerNorms]] = {"norms": []}  # in a dict: a compiled step sets no attributes


def _check(group: dict[str, Any]) -> None:
    """Raise for a value of a group that is out of its range."""
    check_adapt(group)
    if not 0 <= group["lr"] < math.inf:
        raise ValueError(f"lr={group['lr']!r}: must be at least 0 and finite")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r}: must both be in [0, 1)")
    if not 0 < group["eps"] < math.inf:
        raise ValueError(f"eps={group['eps']!r}: must be above 0 and finite")
    if not 0 <= group["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay={group['weight_decay']!r}: must be at least 0 and finite")
    if not group["max_trust_ratio"] > 0:
        raise ValueError(f"max_trust_ratio={group['max_trust_ratio']!r}: must be above 0")


def _step_device(group: dict[str, Any], param: Tensor) -> torch.device:
    """Where the steps of a parameter are counted: on the device if the kernel does or a CUDA graph must, else on the host."""
    return param.device if group["capturable"] or _fusable(param) else torch.device("cpu")


def _fusable(tensor: Tensor) -> bool:
    """Whether torch has a fused kernel of Adam for it."""
    return tensor.is_floating_point() and (tensor.is_cuda or (tensor.is_cpu and tensor.dtype in (torch.float32, torch.float64)))


def _numbers(group: dict[str, Any]) -> tuple[Any, ...]:
    """What a step of a whole group takes beside tensors and the LR."""
    names = ("eps", "weight_decay", "max_trust_ratio", "bias_correction", "adapt")
    return (*group["betas"], *[group[name] for name in names])


def _adam(
    group: dict[str, Any], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], steps: list[Tensor]
) -> list[Tensor]:
    """The moments advanced and Adam's updates, negated, of multi-tensor operations."""
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(firsts, grads, 1 - beta1)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_addcmul_(seconds, grads, grads, 1 - beta2)
    roots = torch._foreach_sqrt(seconds)
    if group["bias_correction"]:
        counts = torch.stack(steps)
        torch._foreach_div_(roots, list((1 - beta2**counts).sqrt().to(roots[0].dtype).unbind()))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, list((1 - beta1**counts).to(roots[0].dtype).unbind()))
    else:
        torch._foreach_add_(roots, group["eps"])
    return list(torch._foreach_neg(torch._foreach_div(firsts, roots)))
