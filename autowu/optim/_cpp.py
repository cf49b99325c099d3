"""The passes that make norms as loops in C++, which torch's compiler builds for those who compile a step on the CPU."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from typing import Any, Final

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

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


class Loops:
    """The loops, for float32 tensors on the CPU that are dense and of one layout. Each returns two norms."""

    def __init__(self, library: Any) -> None:
        self._norms, self._lamb_update = library.norms, library.lamb_update
        self._norms.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
        self._lamb_update.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 2 + [ctypes.c_int] + [ctypes.c_float] * 7
        self._norms.restype = self._lamb_update.restype = None

    def norms(self, weight: Tensor, grad: Tensor) -> tuple[float, float]:
        """Norms of a weight and of its gradient."""
        totals = _Pair()
        self._norms(weight.data_ptr(), grad.data_ptr(), totals, weight.numel(), _PIECE, torch.get_num_threads())
        return math.sqrt(totals[0]), math.sqrt(totals[1])

    def lamb_update(
        self,
        weight: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        update: Tensor,
        step: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        bias_correction: bool,
    ) -> tuple[float, float]:
        """Advance the moments and leave LAMB's update, negated, in `update`; norms of the weight and of the update."""
        totals = _Pair()
        scale, root = (1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)) if bias_correction else (1.0, 1.0)
        pointers = [tensor.data_ptr() for tensor in (weight, grad, first, second, update)]
        numbers = (1 - beta1, beta2, 1 - beta2, scale, root, eps, decay)
        self._lamb_update(*pointers, totals, weight.numel(), _PIECE, torch.get_num_threads(), *numbers)
        return math.sqrt(totals[0]), math.sqrt(totals[1])


@functools.cache
def build() -> Loops | None:
    """The loops, or None where torch cannot build them."""
    try:
        from torch._inductor.codecache import CppCodeCache

        return Loops(CppCodeCache.load(_SOURCE))
    except Exception as error:  # no compiler, or a torch that builds in another way: the step does without
        _logger.warning("LARS and LAMB: torch could not build their loops in C++, compiled steps are slower without: %s", error)
        return None
