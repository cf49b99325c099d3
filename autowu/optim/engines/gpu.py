"""Whole steps on a GPU: a handful of kernels over all parameters at once, which move hardly more bytes than they must."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from autowu.optim.batches import Batch, LayerNorms, is_dense, note_writes
from autowu.optim.engines import cpu
from autowu.optim.rules import LARS_RULE, LambNumbers, LarsNumbers, Rule

_logger = logging.getLogger(__name__)

_BLOCK: Final = 4096
_WARPS: Final = 8
_WIDTH: Final = 1024
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""What a step of the kernels may be off from one on the CPU, by the dtypes that they take."""


def takes(rule: Rule[Any], batch: Batch) -> bool:
    """Whether the kernels can step a batch; they cannot in float64.

    While a graph is traced or captured they do not: the first has no use for them, the second would keep stale addresses.
    """
    params, *others = batch.columns[: rule.alike]
    if not params or rule.name not in STEPS or batch.sharding is not None or torch.compiler.is_compiling() or is_capturing():
        return False
    # Column by column, which the host does several times faster than row by row.
    devices, dtypes = [param.get_device() for param in params], [param.dtype for param in params]
    return (
        {type(param) for param in batch.params} <= {Parameter, Tensor}
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


def step(rule: Rule[Any], batch: Batch, numbers: Any) -> list[LayerNorms]:
    """Take a step of a rule; norms and ratios of what adapts."""
    note_writes(batch.params)
    return STEPS[rule.name](batch.columns, numbers)


def is_capturing() -> bool:
    """Whether a CUDA graph is captured."""
    on_cuda = not torch.compiler.is_compiling() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(on_cuda and torch.cuda.is_current_stream_capturing())


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
    lr = torch.tensor(0.1, dtype=torch.float64, device=host)
    for sizes, rate in (((16, 8200), lr), ((37, 5001), lr.to(device))):
        own, theirs = _drawn(sizes, device, dtype), _drawn(sizes, host, torch.float32)
        lars = LarsNumbers(
            coef=0.01, eps=1e-8, max_norm=math.inf, weight_decay=0.1, maximize=False, adapt=True, momentum=0.9, dampening=0.3
        )
        lars_sgd([*own[:3], [False, False]], lars._replace(lr=rate))
        cpu.lars_sgd([*theirs[:3], [False, False]], lars._replace(lr=lr), cpu.Passes())
        lars_scale(own[:2], lars)
        for param, grad in zip(*theirs[:2], strict=True):
            ratio = LARS_RULE.trust_ratio(float(param.norm()), float(grad.norm()), lars)
            grad.add_(param, alpha=lars.weight_decay).mul_(ratio)
        _assert_near(own[:3], theirs[:3], _TOLERANCE[dtype])
        own, theirs = _drawn(sizes, device, dtype), _drawn(sizes, host, torch.float32)
        steps, their_steps = ([torch.ones((), dtype=torch.float32, device=place) for _ in sizes] for place in (device, host))
        lamb_numbers = LambNumbers(
            lr=lr, beta1=0.9, beta2=0.99, eps=1e-3, weight_decay=0.1, max_trust_ratio=10.0, bias_correction=True, adapt=True
        )
        lamb([*own, steps], lamb_numbers._replace(lr=rate))
        cpu.lamb([*theirs, their_steps], lamb_numbers, cpu.Passes())
        del own[1], theirs[1]
        _assert_near(own, theirs, _TOLERANCE[dtype])


def _drawn(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """Four columns of tensors: parameters, gradients, and moments, the latter above 0."""
    host = torch.device("cpu")
    lines = [[torch.linspace(low, 1.0, size, dtype=torch.float32, device=host) for size in sizes] for low in (-1, -0.5, 0.1, 0.2)]
    return [[line.to(device, dtype, copy=True) for line in column] for column in lines]


def _assert_near(own: list[list[Tensor]], theirs: list[list[Tensor]], tolerance: float) -> None:
    flat, others = ([tensor for column in columns for tensor in column] for columns in (own, theirs))
    torch.testing.assert_close(
        [tensor.to(other.device, other.dtype) for tensor, other in zip(flat, others, strict=True)],
        others,
        rtol=tolerance,
        atol=tolerance,
    )


class _Launch(NamedTuple):
    """Tensors that one launch of a kernel takes: of one dtype, all or none of them fit for wide loads, all or none fresh."""

    params: list[Tensor]
    steps: list[Tensor]
    table: Tensor
    owner: Tensor
    even: bool
    fresh: bool

    def over_blocks(self, kernel: Any, *args: Any, **named: Any) -> None:
        """Launch a kernel with a program for every block; `named` are numbers and constants of the kernel."""
        if blocks := len(self.owner):
            tensors = (self.table, self.owner, len(self.params), self.params[0])
            with torch.cuda.device_of(self.table):  # type: ignore[no-untyped-call]
                kernel[(blocks,)](*tensors, *args, BLOCK=_BLOCK, EVEN=self.even, num_warps=_WARPS, **named)

    def sums(self) -> Tensor:
        """Room for two sums of squares of every block."""
        return torch.empty(2, len(self.owner), dtype=torch.float32, device=self.table.device)

    def ratios(self, kernel: Any, sums: Tensor, **numbers: float) -> LayerNorms:
        """Norms and ratios of sums of squares."""
        count = len(self.params)
        stats = torch.empty(3, count, dtype=torch.float32, device=self.table.device)
        with torch.cuda.device_of(self.table):  # type: ignore[no-untyped-call]
            named = {name: float(number) for name, number in numbers.items()}
            kernel[(count,)](self.table, count, sums, len(self.owner), stats, **named, WIDTH=_WIDTH)
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


def _lars_ratios(launch: _Launch, numbers: LarsNumbers) -> LayerNorms:
    from autowu.optim.engines import triton

    sums = launch.sums()
    launch.over_blocks(triton.norms, sums, len(launch.owner))
    return launch.ratios(
        triton.lars_ratios,
        sums,
        coef=float(numbers.coef),
        decay=numbers.weight_decay,
        eps=numbers.eps,
        max_norm=numbers.max_norm,
    )


def lars_scale(columns: list[list[Any]], numbers: LarsNumbers) -> list[LayerNorms]:
    """Replace gradients by those that LARS gives to an optimizer. Columns: parameters and gradients."""
    from autowu.optim.engines import triton

    taken = []
    decay = float(-numbers.weight_decay if numbers.maximize else numbers.weight_decay)
    for launch in _launches(columns):
        taken.append(_lars_ratios(launch, numbers))
        launch.over_blocks(triton.scale, taken[-1].values, decay=decay)
    return taken


def lars_sgd(columns: list[list[Any]], numbers: LarsNumbers) -> list[LayerNorms]:
    """A step of torch.optim.SGD on the gradients that LARS gives it; arguments as of the function of the same name of the CPU."""
    from autowu.optim.engines import triton

    taken = []
    params, grads, buffers, fresh = columns
    for launch in _launches((params, grads, *([buffers] if buffers else [])), fresh):
        if numbers.adapt:
            taken.append(_lars_ratios(launch, numbers))
        rate = launch.number(numbers.lr)
        launch.over_blocks(
            triton.sgd,
            taken[-1].values if numbers.adapt else launch.ones(),
            lr=rate,
            decay=float(numbers.weight_decay),
            momentum=float(numbers.momentum),
            dampening=float(numbers.dampening),
            ADDRESS=isinstance(rate, Tensor),
            MOMENTUM=bool(buffers),
            FRESH=launch.fresh,
            NESTEROV=numbers.nesterov,
            MAXIMIZE=numbers.maximize,
        )
    return taken


def lamb(columns: list[list[Any]], numbers: LambNumbers) -> list[LayerNorms]:
    """A step of LAMB; arguments as of the function of the same name of the CPU."""
    from autowu.optim.engines import triton

    taken = []
    *moving, steps = columns
    torch._foreach_add_(steps, 1)
    beta1, beta2, eps, decay = (float(number) for number in (numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay))
    for launch in _launches(moving, steps=steps):
        if numbers.bias_correction:
            counts = torch.stack(launch.steps).to(launch.table.device, torch.float64)  # a state may be put back on the host
            corrections = torch.stack((1 - beta1**counts, 1 - beta2**counts))
        else:
            corrections = launch.ones().double()
        sums, rate = launch.sums(), launch.number(numbers.lr)
        shares = {"new1": 1 - beta1, "beta2": beta2, "new2": 1 - beta2}
        launch.over_blocks(triton.moments, sums, len(launch.owner), corrections, **shares, eps=eps, decay=decay)
        if numbers.adapt:
            taken.append(launch.ratios(triton.lamb_ratios, sums, cap=numbers.max_trust_ratio))
        stats = taken[-1].values if numbers.adapt else launch.ones()
        launch.over_blocks(triton.lamb, stats, corrections, lr=rate, eps=eps, decay=decay, ADDRESS=isinstance(rate, Tensor))
    return taken


STEPS: Final[dict[str, Callable[..., list[LayerNorms]]]] = {"lars": lars_sgd, "lamb": lamb}
"""A rule's step by its name. That of LARS is with torch's SGD; around another optimizer there is :func:`lars_scale`."""
