"""Whole steps on a GPU: a handful of kernels over all parameters at once, which move hardly more bytes than they must."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
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
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""What a step of the kernels may be off from one on the CPU, by the dtypes that they take."""


def have_kernels(params: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether the kernels can step parameters, given what goes with each; they cannot in float64.

    While a graph is traced or captured they do not: the first has no use for them, the second would keep stale addresses.
    """
    if not params or torch.compiler.is_compiling() or is_capturing():
        return False
    # Column by column, which the host does several times faster than row by row.
    devices, dtypes = [param.get_device() for param in params], [param.dtype for param in params]
    return (
        {type(param) for param in params} <= {Parameter, Tensor}
        and set(dtypes) <= _TOLERANCE.keys()
        and all([other.dtype for other in column] == dtypes for column in others)
        and all([other.get_device() for other in column] == devices for column in others)
        and all(map(is_dense, params))
        and all(_are_laid_out_alike(params, column) for column in others)
        and all(
            _works(param.device, param.dtype)
            for param in dict(zip(zip(devices, dtypes, strict=True), params, strict=True)).values()
        )
    )


def _are_laid_out_alike(params: list[Tensor], others: list[Tensor]) -> bool:
    """Whether elements of tensors and others pair in memory."""
    if [param.stride() for param in params] == [other.stride() for other in others]:  # as a rule, and it costs least
        return True
    # Where there is one index, as in kernels of 1 x 1, the stride may be anything.
    rows = [zip(a.shape, a.stride(), b.shape, b.stride(), strict=True) for a, b in zip(params, others, strict=True)]
    return all(size == other and (size == 1 or here == there) for row in rows for size, here, other, there in row)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give on a device what the CPU gives. Waits for it, once."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    try:
        if importlib.util.find_spec("triton") is None:
            return False
        _try(device, dtype)
    except Exception as error:  # no compiler for the host, a device too old: a step is then made of torch's own operations
        _logger.warning("LARS and LAMB: no kernels for %s on %s, steps are slower without: %s", dtype, device, error)
        return False
    return True


def _try(device: torch.device, dtype: torch.dtype) -> None:
    """Raise if a step here and one on the CPU in float32 differ: of two tensors, of a block and of several, even and not."""
    host = torch.device("cpu")
    lr, coef = (torch.tensor(number, dtype=torch.float64, device=host) for number in (0.1, 0.01))
    for sizes, rate in (((16, 8200), lr), ((37, 5001), lr.to(device))):

        def draw(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = sizes) -> list[list[Tensor]]:
            lines = [
                [torch.linspace(low, 1.0, size, dtype=torch.float32, device=host) for size in sizes] for low in (-1, -0.5, 0.1, 0.2)
            ]
            return [[line.to(device, dtype, copy=True) for line in column] for column in lines]

        (params, grads, buffers, _), theirs = draw(device, dtype), draw(host, torch.float32)
        numbers = (1e-8, math.inf, 0.1, 0.9, 0.3, False, False, True)
        lars_sgd_(params, grads, buffers, [False, False], rate, 0.01, *numbers)
        _host.lars_sgd_(theirs[0], theirs[1], theirs[2], [False, False], lr, coef, *numbers)
        lars_scale_(params, grads, 0.01, 1e-8, math.inf, 0.1, False)
        for param, grad in zip(theirs[0], theirs[1], strict=True):
            norms = float(param.norm()), float(grad.norm())
            grad.add_(param, alpha=0.1).mul_(_host.lars_ratio(*norms, 0.01, 0.1, 1e-8, math.inf))
        torch.testing.assert_close(
            [tensor.to(host, torch.float32) for tensor in params + grads + buffers],
            theirs[0] + theirs[1] + theirs[2],
            rtol=_TOLERANCE[dtype],
            atol=_TOLERANCE[dtype],
        )
        (params, grads, firsts, seconds), theirs = draw(device, dtype), draw(host, torch.float32)
        steps, their_steps = ([torch.ones((), dtype=torch.float32, device=place) for _ in sizes] for place in (device, host))
        lamb_(params, grads, firsts, seconds, steps, rate, 0.9, 0.99, 1e-3, 0.1, 10.0, True, True)
        _host.lamb_(theirs[0], theirs[1], theirs[2], theirs[3], their_steps, lr, 0.9, 0.99, 1e-3, 0.1, 10.0, True, True)
        torch.testing.assert_close(
            [tensor.to(host, torch.float32) for tensor in params + firsts + seconds],
            theirs[0] + theirs[2] + theirs[3],
            rtol=_TOLERANCE[dtype],
            atol=_TOLERANCE[dtype],
        )


class _Launch(NamedTuple):
    """Tensors that one launch of a kernel takes: of one dtype, all or none of them fit for wide loads, all or none fresh."""

    params: list[Tensor]
    steps: list[Tensor]
    table: Tensor
    owner: Tensor
    even: bool
    fresh: bool

    def over_blocks(self, kernel: Any, *args: Any, **constants: bool) -> None:
        """Launch a kernel with a program for every block."""
        if blocks := len(self.owner):
            tensors = (self.table, self.owner, len(self.params), self.params[0])
            with torch.cuda.device_of(self.table):  # type: ignore[no-untyped-call]
                kernel[(blocks,)](*tensors, *args, BLOCK=_BLOCK, EVEN=self.even, num_warps=_WARPS, **constants)

    def sums(self) -> Tensor:
        """Room for two sums of squares of every block."""
        return torch.empty(2, len(self.owner), dtype=torch.float32, device=self.table.device)

    def ratios(self, kernel: Any, sums: Tensor, *numbers: float) -> LayerNorms:
        """Norms and ratios of sums of squares."""
        count = len(self.params)
        stats = torch.empty(3, count, dtype=torch.float32, device=self.table.device)
        with torch.cuda.device_of(self.table):  # type: ignore[no-untyped-call]
            kernel[(count,)](self.table, count, sums, len(self.owner), stats, *map(float, numbers), WIDTH=_WIDTH)
        return LayerNorms(self.params, stats)

    def ones(self) -> Tensor:
        """Norms and ratios where nothing adapts."""
        return torch.ones(3, len(self.params), dtype=torch.float32, device=self.table.device)

    def number(self, value: float | Tensor) -> float | Tensor:
        """A number as kernels take it: a float, or a tensor that is on a device and stays on one."""
        return value.to(self.table.device, non_blocking=True) if isinstance(value, Tensor) and not value.is_cpu else float(value)


def _launches(columns: Sequence[list[Tensor]], fresh: Sequence[bool] = (), steps: Sequence[Tensor] = ()) -> Iterator[_Launch]:
    """Parameters and what goes with each, sorted by what a launch has in common."""
    if not (params := columns[0]):
        return
    sizes = [param.numel() for param in params]
    pointers = [[tensor.data_ptr() for tensor in column] for column in columns]
    even = ((np.bitwise_or.reduce(np.array(pointers, dtype=np.int64)) % 16 == 0) & (np.array(sizes) % 8 == 0)).tolist()
    keys = list(zip([p.get_device() for p in params], [p.dtype for p in params], even, fresh or even, strict=True))
    found: dict[Any, list[int]] = {}
    if keys.count(keys[0]) == len(keys):  # as a rule
        found[keys[0]] = list(range(len(keys)))
    else:
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
    for (_, _, wide, new), rows in found.items():
        device, own = params[rows[0]].device, tuple([sizes[i] for i in rows])
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        table = _table(device, stream, own, tuple([tuple([column[i] for i in rows]) for column in pointers]))
        yield _Launch(
            [params[i] for i in rows],
            [steps[i] for i in rows] if steps else [],
            table,
            _owner(device, stream, own),
            wide,
            bool(fresh) and new,
        )


# Kept from step to step, for sizes stay as they are, and addresses as a rule; by stream, for another would not wait for the copy.
@functools.lru_cache(maxsize=128)
def _table(device: torch.device, stream: int, sizes: tuple[int, ...], pointers: tuple[tuple[int, ...], ...]) -> Tensor:
    """The table of the kernels: sizes, first blocks, numbers of blocks and addresses."""
    counts = _blocks(sizes)
    return _sent(np.stack((sizes, counts.cumsum() - counts, counts, *pointers), dtype=np.int64), device)


@functools.lru_cache(maxsize=128)
def _owner(device: torch.device, stream: int, sizes: tuple[int, ...]) -> Tensor:
    """Of which tensor each block is."""
    return _sent(np.repeat(np.arange(len(sizes), dtype=np.int32), _blocks(sizes)), device)


def _blocks(sizes: tuple[int, ...]) -> Any:
    return -(-np.array(sizes, dtype=np.int64) // _BLOCK)


def _sent(array: Any, device: torch.device) -> Tensor:
    """An array on the device, copied without waiting."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _lars_ratios(launch: _Launch, coef: float, eps: float, max_norm: float, decay: float) -> LayerNorms:
    from autowu.optim import _triton

    sums = launch.sums()
    launch.over_blocks(_triton.norms, sums, len(launch.owner))
    return launch.ratios(_triton.lars_ratios, sums, coef, decay, eps, max_norm)


def lars_scale_(
    params: list[Tensor], grads: list[Tensor], coef: float, eps: float, max_norm: float, decay: float, maximize: bool
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
    coef: float,
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

    taken = []
    for launch in _launches((params, grads, *([buffers] if buffers else [])), fresh):
        if adapt:
            taken.append(_lars_ratios(launch, coef, eps, max_norm, weight_decay))
        rate = launch.number(lr)
        launch.over_blocks(
            _triton.sgd,
            taken[-1].values if adapt else launch.ones(),
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

    taken = []
    torch._foreach_add_(steps, 1)
    for launch in _launches((params, grads, firsts, seconds), steps=steps):
        if bias_correction:
            counts = torch.stack(launch.steps).double()
            corrections = torch.stack((1 - beta1**counts, 1 - beta2**counts))
        else:
            corrections = launch.ones().double()
        sums, rate = launch.sums(), launch.number(lr)
        numbers = (float(1 - beta1), float(beta2), float(1 - beta2), float(eps), float(weight_decay))
        launch.over_blocks(_triton.moments, sums, len(launch.owner), corrections, *numbers)
        if adapt:
            taken.append(launch.ratios(_triton.lamb_ratios, sums, max_trust_ratio))
        stats = taken[-1].values if adapt else launch.ones()
        launch.over_blocks(
            _triton.lamb, stats, corrections, rate, float(eps), float(weight_decay), ADDRESS=isinstance(rate, Tensor)
        )
    return taken
