"""Whole steps on a GPU: a handful of kernels over all parameters at once, which move no more bytes than they must."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from autowu.optim import _host
from autowu.optim._functional import LayerNorms, is_capturing
from autowu.optim._host import is_dense

_logger = logging.getLogger(__name__)

_BLOCK: Final = 4096
_WARPS: Final = 8
_WIDTH: Final = 1024
_DTYPES: Final = {torch.float32, torch.bfloat16, torch.float16}


def have_kernels(params: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether the kernels do right by parameters and what goes with each: not in double precision, for one.

    While a graph is traced or captured they do not: the first has no use for them, the second would keep stale addresses.
    """
    if not params or torch.compiler.is_compiling() or is_capturing():
        return False
    # Column by column, which the host does several times faster than row by row.
    dtypes, strides = [param.dtype for param in params], [param.stride() for param in params]
    return (
        {type(param) for param in params} <= {Parameter, Tensor}
        and set(dtypes) <= _DTYPES
        and all(_works(device) for device in {param.device for param in params})
        and all([other.dtype for other in column] == dtypes for column in others)
        and all([other.stride() for other in column] == strides for column in others)
        and all(map(is_dense, params))
    )


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the kernels give on a device what the CPU gives. Waits for it, once."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        _try(device)
    except Exception as error:  # no compiler for the host, a device too old: a step is then made of torch's own operations
        _logger.warning("LARS and LAMB: their kernels do not run on %s, steps are slower without: %s", device, error)
        return False
    return True


def _try(device: torch.device) -> None:
    """Raise if a step here and one on the CPU differ."""
    lr, coef = (torch.tensor(number, dtype=torch.float64, device="cpu") for number in (0.1, 0.01))
    lars = (lr, coef, 1e-8, math.inf, 0.1, 0.9, 0.3, False, False, True)
    lamb = (lr, 0.9, 0.99, 1e-6, 0.1, 10.0, True, True)
    for size in (16, 37):
        columns = [torch.linspace(low, 1.0, size, device="cpu") for low in (-1.0, -0.5, 0.1, 0.2)]
        (*sgd,), (*adam,) = ([[column.to(device, copy=True)] for column in some] for some in (columns[:3], columns))
        lars_sgd_(sgd[0], sgd[1], sgd[2], [False], *lars)
        lamb_(adam[0], adam[1], adam[2], adam[3], [torch.ones((), device=device)], *lamb)
        (*their_sgd,), (*their_adam,) = ([[column.clone()] for column in some] for some in (columns[:3], columns))
        _host.lars_sgd_(their_sgd[0], their_sgd[1], their_sgd[2], [False], *lars)
        _host.lamb_(their_adam[0], their_adam[1], their_adam[2], their_adam[3], [torch.ones((), device="cpu")], *lamb)
        for (own,), (other,) in zip(sgd + adam, their_sgd + their_adam, strict=True):
            torch.testing.assert_close(own.cpu(), other, rtol=1e-4, atol=1e-5)


class _Plan(NamedTuple):
    """Which tensor a block is of, the first block of each, and their sizes, on the device; and how many blocks there are."""

    owner: Tensor
    starts: Tensor
    sizes: Tensor
    blocks: int


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], device: torch.device) -> _Plan:
    elements = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    counts = (elements + _BLOCK - 1) // _BLOCK
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), counts)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0))).to(torch.int32)
    return _Plan(owner.to(device), starts.to(device), elements.to(device), len(owner))


class _Launch(NamedTuple):
    """Tensors that one launch of a kernel takes: of one dtype, all or none of them fit for wide loads, all or none fresh."""

    params: list[Tensor]
    steps: list[Tensor]
    table: Tensor
    plan: _Plan
    even: bool
    fresh: bool

    def over_blocks(self, kernel: Any, *args: Any, **constants: bool) -> None:
        """Launch a kernel with a program for every block."""
        table = (self.table, *self.plan[:3], len(self.params), self.params[0])
        if self.plan.blocks:
            with torch.cuda.device_of(self.table):  # type: ignore[no-untyped-call]
                kernel[(self.plan.blocks,)](*table, *args, BLOCK=_BLOCK, EVEN=self.even, num_warps=_WARPS, **constants)

    def ratios(self, kernel: Any, sums: Tensor, *args: Any, **constants: bool) -> Tensor:
        """(3, k) norms and ratios of sums of squares (2, blocks)."""
        count = len(self.params)
        stats = torch.empty(3, count, dtype=torch.float32, device=self.table.device)
        with torch.cuda.device_of(self.table):  # type: ignore[no-untyped-call]
            kernel[(count,)](self.plan.starts, sums, self.plan.blocks, stats, count, *args, WIDTH=_WIDTH, **constants)
        return stats

    def sums(self) -> Tensor:
        """Room for two sums of squares of every block."""
        return torch.empty(2, self.plan.blocks, dtype=torch.float32, device=self.table.device)


def _launches(columns: Sequence[list[Tensor]], fresh: Sequence[bool] = (), steps: Sequence[Tensor] = ()) -> Iterator[_Launch]:
    """Rows of tensors sorted by what a launch has in common; empty ones have no part in any."""
    if not (params := columns[0]):
        return
    sizes = [param.numel() for param in params]
    pointers = np.array([[tensor.data_ptr() for tensor in column] for column in columns])
    wide = ((np.bitwise_or.reduce(pointers) % 16 == 0) & (np.array(sizes) % 8 == 0)).tolist()
    keys = list(zip([p.get_device() for p in params], [p.dtype for p in params], wide, fresh or wide, strict=True))
    found: dict[Any, list[int]] = {}
    if keys.count(keys[0]) == len(keys):  # as a rule
        found[keys[0]] = list(range(len(keys)))
    else:
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
    for (_, _, even, new), rows in found.items():
        device = params[rows[0]].device
        addresses = torch.from_numpy(np.ascontiguousarray(pointers[:, rows]))
        if device.type == "cuda":
            addresses = addresses.pin_memory()  # and so nothing waits for the copy
        plan = _plan(tuple([sizes[i] for i in rows]), device)
        addresses = addresses.to(device, non_blocking=True)
        yield _Launch(
            [params[i] for i in rows], [steps[i] for i in rows] if steps else [], addresses, plan, even, bool(fresh) and new
        )


def _number(value: float | Tensor) -> float | Tensor:
    """A number as kernels take it: a float, or a tensor that is on a device and stays there."""
    return value if isinstance(value, Tensor) and not value.is_cpu else float(value)


def _lars_ratios(launch: _Launch, coef: float | Tensor, eps: float, max_norm: float, decay: float) -> LayerNorms:
    from autowu.optim import _triton

    sums, factor = launch.sums(), _number(coef)
    launch.over_blocks(_triton.norms, sums, launch.plan.blocks)
    numbers = (factor, float(decay), float(eps), float(max_norm))
    return LayerNorms(launch.params, launch.ratios(_triton.lars_ratios, sums, *numbers, ADDRESS=isinstance(factor, Tensor)))


def lars_scale_(
    params: list[Tensor], grads: list[Tensor], coef: float | Tensor, eps: float, max_norm: float, decay: float, maximize: bool
) -> list[LayerNorms]:
    """Replace gradients by those that LARS gives to an optimizer.

    Args:
        params, grads: k parameters of :func:`have_kernels`, and k gradients.
        coef: the trust coefficient.
        max_norm: the norms count as this at most.
        decay: the weight decay.
        maximize: whether the optimizer will go up the gradients.
    """
    from autowu.optim import _triton

    taken = []
    for launch in _launches((params, grads)):
        taken.append(_lars_ratios(launch, coef, eps, max_norm, decay))
        launch.over_blocks(_triton.scale, taken[-1].values, float(-decay if maximize else decay))
    return taken


def lars_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    fresh: list[bool],
    lr: float | Tensor,
    coef: float | Tensor,
    eps: float,
    max_norm: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    adapt: bool,
) -> list[LayerNorms]:
    """A step of torch.optim.SGD on the gradients that LARS gives it; arguments as of the function of the same name on the host."""
    from autowu.optim import _triton

    taken, rate = [], _number(lr)
    for launch in _launches((params, grads, *([buffers] if buffers else [])), fresh):
        if adapt:
            taken.append(_lars_ratios(launch, coef, eps, max_norm, weight_decay))
            stats = taken[-1].values
        else:
            stats = torch.ones(3, len(launch.params), dtype=torch.float32, device=launch.table.device)
        launch.over_blocks(
            _triton.sgd,
            stats,
            rate,
            float(weight_decay),
            float(momentum),
            float(dampening),
            ADDRESS=isinstance(rate, Tensor),
            MOMENTUM=bool(buffers),
            FRESH=launch.fresh,
            NESTEROV=nesterov,
            MAXIMIZE=maximize,
        )
    return taken


def lamb_(
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
    max_trust_ratio: float,
    bias_correction: bool,
    adapt: bool,
) -> list[LayerNorms]:
    """A step of LAMB; arguments as of the function of the same name on the host."""
    from autowu.optim import _triton

    torch._foreach_add_(steps, 1)
    if not adapt:
        counts = _host.counts(steps, bias_correction)
        _host.adamw_(params, grads, firsts, seconds, counts, _number(lr), beta1, beta2, eps, weight_decay)
        return []
    taken, rate = [], _number(lr)
    for launch in _launches((params, grads, firsts, seconds), steps=steps):
        count = torch.stack(_host.counts(launch.steps, bias_correction)).double()
        corrections = torch.stack((1 - beta1**count, 1 - beta2**count))
        sums = launch.sums()
        numbers = (float(1 - beta1), float(beta2), float(1 - beta2), float(eps), float(weight_decay))
        launch.over_blocks(_triton.moments, sums, launch.plan.blocks, corrections, *numbers)
        stats = launch.ratios(_triton.lamb_ratios, sums, float(max_trust_ratio))
        launch.over_blocks(
            _triton.lamb, stats, corrections, rate, float(eps), float(weight_decay), ADDRESS=isinstance(rate, Tensor)
        )
        taken.append(LayerNorms(launch.params, stats))
    return taken
