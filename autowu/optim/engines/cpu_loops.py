"""Steps of compiled graphs on the CPU: an operator for each rule, with the passes that make norms as loops in C++.

A step of Python costs torch's compiler minutes and comes out slower; an operator it calls. A compiler is at hand there, and builds
the loops.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, get_type_hints

import torch
from torch import Tensor

from autowu.optim.batches import Batch, LayerNorms
from autowu.optim.engines import cpu
from autowu.optim.rules import LambNumbers, LarsNumbers, Rule

_logger = logging.getLogger(__name__)

_COMPILES: Final = torch.__version__ >= (2, 6)  # type: ignore[operator]
"""Whether torch's compiler takes operators that write to lists of tensors."""
_PIECE: Final = 1024
"""Elements whose squares are summed in float32; the sums of pieces, in float64 and in order, do not depend on the threads."""

_SOURCE: Final = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // which torch turns off
#endif

static void add_up(const std::vector<double>& sums, double* totals) {  // in order, whatever the threads
  const size_t half = sums.size() / 2;
  totals[0] = totals[1] = 0;
  for (size_t k = 0; k < half; ++k) {
    totals[0] += sums[k];
    totals[1] += sums[half + k];
  }
}

extern "C" void norms(
    const float* __restrict weight, const float* __restrict grad, double* totals, int64_t size, int64_t piece, int threads) {
  const int64_t pieces = (size + piece - 1) / piece;
  std::vector<double> sums(2 * pieces);
  #pragma omp parallel for schedule(static) num_threads(threads) if (size > 32768)
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t end = std::min(size, (k + 1) * piece);
    float weights = 0, grads = 0;
    #pragma omp simd reduction(+ : weights, grads)
    for (int64_t i = k * piece; i < end; ++i) {
      weights += weight[i] * weight[i];
      grads += grad[i] * grad[i];
    }
    sums[k] = weights;
    sums[pieces + k] = grads;
  }
  add_up(sums, totals);
}

extern "C" void lamb_update(
    const float* __restrict weight, const float* __restrict grad, float* __restrict first, float* __restrict second,
    float* __restrict update, double* totals, int64_t size, int64_t piece, int threads,
    float new1, float beta2, float new2, float scale, float root, float eps, float decay) {
  const int64_t pieces = (size + piece - 1) / piece;
  std::vector<double> sums(2 * pieces);
  #pragma omp parallel for schedule(static) num_threads(threads) if (size > 32768)
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t end = std::min(size, (k + 1) * piece);
    float weights = 0, updates = 0;
    #pragma omp simd reduction(+ : weights, updates)
    for (int64_t i = k * piece; i < end; ++i) {
      const float w = weight[i], g = grad[i];
      const float m = first[i] + new1 * (g - first[i]);
      const float v = beta2 * second[i] + new2 * g * g;
      const float u = -scale * m / (std::sqrt(v) * root + eps) - decay * w;
      first[i] = m;
      second[i] = v;
      update[i] = u;
      weights += w * w;
      updates += u * u;
    }
    sums[k] = weights;
    sums[pieces + k] = updates;
  }
  add_up(sums, totals);
}
"""


_Pair: Any = ctypes.c_double * 2


class Loops(cpu.Passes):
    """The loops, for float32; what is of another dtype is made as in eager steps."""

    def __init__(self, library: Any) -> None:
        self._norms, self._lamb_update = library.norms, library.lamb_update
        self._norms.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
        self._lamb_update.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 2 + [ctypes.c_int] + [ctypes.c_float] * 7
        self._norms.restype = self._lamb_update.restype = None

    def norms(self, weight: Tensor, grad: Tensor) -> tuple[float, float]:
        if weight.dtype != torch.float32:
            return super().norms(weight, grad)
        totals = _Pair()
        self._norms(weight.data_ptr(), grad.data_ptr(), totals, weight.numel(), _PIECE, torch.get_num_threads())
        return math.sqrt(totals[0]), math.sqrt(totals[1])

    def lamb_update(
        self, weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, update: Tensor, count: Tensor, numbers: LambNumbers
    ) -> tuple[float, float]:
        if weight.dtype != torch.float32:
            return super().lamb_update(weight, grad, first, second, update, count, numbers)
        totals, steps, beta1, beta2 = _Pair(), count.item(), numbers.beta1, numbers.beta2
        scale, root = 1 / (1 - beta1**steps), 1 / math.sqrt(1 - beta2**steps)
        pointers = [tensor.data_ptr() for tensor in (weight, grad, first, second, update)]
        coefficients = (1 - beta1, beta2, 1 - beta2, scale, root, numbers.eps, numbers.weight_decay)
        self._lamb_update(*pointers, totals, weight.numel(), _PIECE, torch.get_num_threads(), *coefficients)
        return math.sqrt(totals[0]), math.sqrt(totals[1])


def check_cache(folder: str) -> None:
    """Raise PermissionError for a cache where another user could put a library, which this process would load and run."""
    if not hasattr(os, "geteuid"):  # Windows keeps a temporary folder for each user
        return
    path = Path(folder).absolute()
    cure = "set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
    for owner in (path.lstat().st_uid, path.stat().st_uid):  # who owns a link may turn it elsewhere
        if owner != os.geteuid():
            raise PermissionError(f"torch's cache {path} belongs to user {owner}, not to {os.geteuid()}; {cure}")
    mode, group = path.stat().st_mode, path.stat().st_gid
    # By custom nobody else is in the group of one's own number.
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and group != os.geteuid()):
        raise PermissionError(f"torch's cache {path} may be written by others (mode {stat.S_IMODE(mode):o}); {cure}")
    for above in (*path.parents, *path.resolve().parents):
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"torch's cache {path} may be replaced by others, who may write to {above}; {cure}")


@functools.cache
def build() -> cpu.Passes:
    """The loops, or the passes of eager steps where torch cannot build them, or where its cache is not this user's alone."""
    try:
        from torch._inductor.codecache import CppCodeCache
        from torch._inductor.runtime.runtime_utils import cache_dir  # type: ignore[attr-defined]

        check_cache(cache_dir())
        return Loops(CppCodeCache.load(_SOURCE))
    except PermissionError as error:
        _logger.warning("LARS and LAMB: no loops in C++, compiled steps are slower without: %s", error)
        return cpu.Passes()
    except Exception as error:  # no compiler, or a torch that builds in another way: the step does without
        _logger.warning("LARS and LAMB: torch could not build their loops in C++, compiled steps are slower without: %s", error)
        return cpu.Passes()


class _Signature(NamedTuple):
    """What the operator of a rule takes: columns, as their schema has them, then the numbers of the rule."""

    columns: tuple[str, ...]
    numbers: type[Any]

    def kinds(self) -> list[str]:
        """The schema's types of the numbers. What may be a tensor is one, or a compiler would take it for fixed."""
        hints = get_type_hints(self.numbers)
        return [{float: "float", bool: "bool"}.get(hints[name], "Tensor") for name in self.numbers._fields]

    def schema(self) -> str:
        """The arguments as torch reads them."""
        numbers = [f"{kind} {name}" for kind, name in zip(self.kinds(), self.numbers._fields, strict=True)]
        return ", ".join([*self.columns, *numbers])

    def split(self, args: tuple[Any, ...]) -> tuple[list[Any], Any]:
        """Columns and numbers of a call."""
        count = len(self.columns)
        return list(args[:count]), self.numbers(*args[count:])


_SIGNATURES: Final = {
    "lars": _Signature(
        ("Tensor(a!)[] params", "Tensor(b!)[] grads", "Tensor(c!)[] buffers", "bool[] fresh"),
        LarsNumbers,
    ),
    "lamb": _Signature(
        ("Tensor(a!)[] params", "Tensor[] grads", "Tensor(b!)[] firsts", "Tensor(c!)[] seconds", "Tensor(d!)[] steps"),
        LambNumbers,
    ),
}
_KINDS: Final = {name: signature.kinds() for name, signature in _SIGNATURES.items()}
_OPERATORS: Final[dict[str, Callable[..., Tensor]]] = {}
_LIBRARIES: Final[list[torch.library.Library]] = []  # kept: with a library its operators go
_LOCK: Final = threading.Lock()


def register() -> None:
    """Define the operators, for which it must not be traced: every optimizer does when it is made, copied or unpickled.

    Threads may call it at once; after a call that was cut short the next begins anew.
    """
    if not _COMPILES:
        return
    with _LOCK:
        if _OPERATORS:
            return
        library = torch.library.Library("autowu", "FRAGMENT")  # type: ignore[no-untyped-call]
        try:
            operators = {name: _define(name, signature, library) for name, signature in _SIGNATURES.items()}
            _LIBRARIES.append(library)
            _OPERATORS.update(operators)
        except BaseException:
            _OPERATORS.clear()
            library._destroy()  # type: ignore[no-untyped-call]
            raise


def _define(name: str, signature: _Signature, library: torch.library.Library) -> Callable[..., Tensor]:
    """The operator of a rule, which lives as long as the library does."""

    def step(*args: Any) -> Tensor:
        columns, numbers = signature.split(args)
        return cpu.STEPS[name](columns, numbers, build())

    def fake(*args: Any) -> Tensor:
        columns, numbers = signature.split(args)
        return torch.empty(3, len(columns[0]) if numbers.adapt else 0, dtype=torch.float64, device="cpu")

    # By hand and not as a `custom_op`, which counts up the version of every tensor in Python.
    operator = f"autowu::{name}_"
    torch.library.define(operator, f"({signature.schema()}) -> Tensor", lib=library)
    torch.library.impl(operator, "CPU", step, lib=library)
    torch.library.register_fake(operator, fake, lib=library)
    made: Callable[..., Tensor] = getattr(torch.ops.autowu, f"{name}_").default
    return made


def takes(rule: Rule[Any], batch: Batch) -> bool:
    """Whether an operator does right by a batch."""
    return _COMPILES and cpu.takes(rule, batch)


def step(rule: Rule[Any], batch: Batch, numbers: Any) -> list[LayerNorms]:
    """Take a step of a rule; norms and ratios of what adapts."""
    args = [
        torch.as_tensor(number, dtype=torch.float64, device="cpu") if kind == "Tensor" else number
        for kind, number in zip(_KINDS[rule.name], numbers, strict=True)
    ]
    norms = _OPERATORS[rule.name](*batch.columns, *args)
    return [LayerNorms(batch.params, norms)] if numbers.adapt else []
