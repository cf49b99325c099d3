"""Whole steps on the CPU: a parameter at a time, while the cache has it, by torch's fused kernels.

They are functions and operators: `torch.compile` calls the latter, for a step of Python costs it minutes to compile and is slower.
As a compiler is at hand there, the operators make norms in loops of C++ (`_cpp.py`).
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from autowu.optim._cpp import Loops, build

_PIECE: Final = 1 << 20
_COMPILES: Final = torch.__version__ >= (2, 6)  # type: ignore[operator]
"""Whether torch's compiler takes operators that write to lists of tensors."""
_SMALL: Final = 1e-6
"""Of a ratio below this, 1 - ratio would not keep what float32 can."""


def has_kernel(param: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernels on the CPU do right by a parameter and what goes with it; not in half precision, for one."""
    if torch.compiler.is_compiling() and not _COMPILES:
        return False
    plain = type(param) in (Parameter, Tensor) and param.is_cpu and param.dtype in (torch.float32, torch.float64)
    return plain and same_layout(param, *others)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie one after the other in memory, in an order that is tensor's or channels'."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def same_layout(first: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernels, which run through memory, pair the right elements."""
    stride, dtype = first.stride(), first.dtype
    return is_dense(first) and all(other.stride() == stride and other.dtype == dtype for other in others)


def host_norm(tensor: Tensor) -> float:
    """The 2-norm of a tensor on the CPU."""
    if tensor.dtype in (torch.float32, torch.float64) and is_dense(tensor):
        return _norm(tensor)
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


def _norm(tensor: Tensor) -> float:
    """The 2-norm of a dense tensor: BLAS is twice as fast as torch's norm where the tensor is in the cache."""
    size = tensor.numel()
    line = tensor.as_strided((size,), (1,))
    if size <= _PIECE:
        return math.sqrt(torch.dot(line, line).item())
    # In pieces, for BLAS sums in the tensor's precision.
    return math.sqrt(sum(torch.dot(piece, piece).item() for piece in torch.split(line, _PIECE)))


def at_most(number: Any, cap: float) -> Any:
    """A float or tensor, or what it may be at most."""
    return number.clamp(max=cap) if isinstance(number, Tensor) else min(number, cap)


def lars_ratio(weight: Any, grad: Any, coef: Any, decay: float, eps: float, max_norm: float) -> Any:
    """The trust ratio of LARS for norms above 0 of a weight and its gradient: floats or tensors."""
    weight, grad = at_most(weight, max_norm), at_most(grad, max_norm)
    return coef * weight / (grad + decay * weight + eps)


def lars_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    fresh: list[bool],
    lr: Tensor,
    coef: Tensor,
    eps: float,
    max_norm: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    adapt: bool,
    loops: Loops | None = None,
) -> Tensor:
    """A step of torch.optim.SGD on the gradients that LARS gives it.

    Args:
        params, grads, buffers: k parameters of :func:`has_kernel`, k gradients, and k momentum buffers, or none without momentum.
        fresh: of each buffer, whether it holds nothing yet: zeros.
        lr, coef: the learning rate and the trust coefficient, scalars.
        max_norm: the norms count as this at most.
        adapt: whether there are ratios.
        loops: make norms in float32 in place of torch's operations.

    Returns:
        (3, k) weight norms, gradient norms and trust ratios, or (3, 0) without ratios.
    """
    rate, trust_coef, rows = lr.item(), coef.item(), []
    if not adapt and not any(fresh):
        _sgd_(params, grads, buffers, rate, weight_decay, momentum, dampening, nesterov, maximize, False)
        return _columns([])
    divisor = torch.empty((), dtype=torch.float32, device="cpu")
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        buffer, first = buffers[i : i + 1], bool(fresh) and fresh[i]
        ratio = 1.0
        if adapt:
            if loops is not None and param.dtype == torch.float32:
                weight_norm, grad_norm = loops.norms(param, grad)
            else:
                weight_norm, grad_norm = _norm(param), _norm(grad)
            if weight_norm > 0 and grad_norm > 0:
                ratio = lars_ratio(weight_norm, grad_norm, trust_coef, weight_decay, eps, max_norm)
            rows.append((weight_norm, grad_norm, ratio))
        if ratio == 1:
            _sgd_([param], [grad], buffer, rate, weight_decay, momentum, dampening, nesterov, maximize, first)
        elif not buffer:
            _sgd_([param], [grad], [], rate * ratio, weight_decay, 0.0, 0.0, False, maximize, False)
        elif param.dtype != torch.float32 or (ratio < _SMALL and not nesterov):
            grad.mul_(ratio)
            _sgd_([param], [grad], buffer, rate, weight_decay * ratio, momentum, dampening, nesterov, maximize, first)
        elif nesterov:
            divisor.fill_(1 / ratio if ratio != 0 else math.inf)
            _sgd_([param], [grad], buffer, rate, weight_decay * ratio, momentum, 0.0, True, maximize, first, divisor)
        else:  # What dampening leaves of the gradient is the ratio; unlike a scale of the gradient it costs no writing.
            left = ratio if first else ratio * (1 - dampening)
            _sgd_([param], [grad], buffer, rate, weight_decay, momentum, 1 - left, False, maximize, False)
    return _columns(rows)


def _columns(rows: list[tuple[float, float, float]]) -> Tensor:
    """(3, k) numbers of k rows."""
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, 3).T.contiguous()


def _sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    divisor: Tensor | None = None,
) -> None:
    torch._fused_sgd_(
        params,
        grads,
        buffers,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=first,
        grad_scale=divisor,
    )


def lamb_(
    params: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_trust_ratio: float,
    bias_correction: bool,
    adapt: bool,
    loops: Loops | None = None,
) -> Tensor:
    """A step of LAMB, or of torch.optim.AdamW where there are no ratios.

    Args:
        params, grads, firsts, seconds, steps: k parameters of :func:`has_kernel` and of one dtype, k gradients, both moments and
            the steps taken.
        lr: the learning rate, a scalar.
        loops: make updates and norms in float32 in place of torch's operations.

    Returns:
        (3, k) weight norms, update norms and trust ratios, or (3, 0) without ratios.
    """
    torch._foreach_add_(steps, 1)
    taken = counts(steps, bias_correction)
    rate, rows = lr.item(), []
    if not adapt:
        adamw_(params, grads, firsts, seconds, taken, rate, beta1, beta2, eps, weight_decay)
        return _columns([])
    scratch = torch.empty(max(param.numel() for param in params), dtype=params[0].dtype, device="cpu")
    for i, param in enumerate(params):
        one = slice(i, i + 1)
        update = scratch.as_strided(param.size(), param.stride())
        if loops is not None and param.dtype == torch.float32:
            row = (param, grads[i], firsts[i], seconds[i], update, steps[i].item())
            weight_norm, update_norm = loops.lamb_update(*row, beta1, beta2, eps, weight_decay, bias_correction)
        else:
            torch.mul(param, -weight_decay, out=update)
            weight_norm = _norm(param)  # here, while the cache has it
            # Adam's kernel makes the update, negated, of weights of 0 at an LR of 1; the decay lies there already.
            adamw_([update], grads[one], firsts[one], seconds[one], taken[one], 1.0, beta1, beta2, eps, 0.0)
            update_norm = _norm(update)
        ratio = min(weight_norm / update_norm, max_trust_ratio) if weight_norm > 0 and update_norm > 0 else 1.0
        param.add_(update, alpha=rate * ratio)
        rows.append((weight_norm, update_norm, ratio))
    return _columns(rows)


def counts(steps: list[Tensor], bias_correction: bool) -> list[Tensor]:
    """The steps taken, for torch's kernel: it corrects nothing after endless ones."""
    return steps if bias_correction else [torch.full_like(step, math.inf) for step in steps]


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Torch's fused kernel of AdamW."""
    torch._fused_adamw_(
        params,
        grads,
        firsts,
        seconds,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _norms_of(params: list[Tensor], *others: Any) -> Tensor:
    """What both operators return, without values."""
    return torch.empty(3, len(params) if others[-1] else 0, dtype=torch.float64, device="cpu")


# For torch.compile. Defined by hand and not as a `custom_op`, which counts up the version of every tensor in Python.
torch.library.define(
    "autowu::lars_sgd_",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] buffers, bool[] fresh, Tensor lr, Tensor coef, float eps, "
    "float max_norm, float weight_decay, float momentum, float dampening, bool nesterov, bool maximize, bool adapt) -> Tensor",
)
torch.library.define(
    "autowu::lamb_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] steps, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, float max_trust_ratio, bool bias_correction, bool adapt) -> Tensor",
)
for name, step in (("autowu::lars_sgd_", lars_sgd_), ("autowu::lamb_", lamb_)):
    torch.library.impl(name, "CPU", lambda *args, step=step: step(*args, build()))
    torch.library.register_fake(name, _norms_of)
lars_sgd_op, lamb_op = torch.ops.autowu.lars_sgd_.default, torch.ops.autowu.lamb_.default
