"""Batches: parameters that go together, of one device, dtype and sharding, and the norms of what they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

Sharding: TypeAlias = "tuple[DeviceMesh, tuple[Placement, ...]]"

_PIECE: Final = 1 << 20


class Batch(NamedTuple):
    """Parameters of one device, dtype and sharding, column by column."""

    params: list[Tensor]
    columns: list[list[Any]]
    """This process's shards: of the parameters, of their gradients, and of what else was given."""
    sharding: Sharding | None
    """None where this process holds the whole tensors."""

    def pieces(self, foreach: bool) -> Iterator[Batch]:
        """The batch whole, for multi-tensor operations, or a parameter at a time, which keeps it in the cache meanwhile."""
        if foreach or self.sharding is not None:  # shards: all their norms in one collective
            yield self
        else:
            for i, param in enumerate(self.params):
                yield Batch([param], [[column[i]] for column in self.columns], None)

    def on_host(self) -> bool:
        """Whether numbers of it may be read without waiting for a device."""
        return len(self.params) == 1 and self.params[0].is_cpu and self.sharding is None and not torch.compiler.is_compiling()

    def norms(self, tensors: Sequence[Tensor], least: torch.dtype = torch.float32) -> Tensor:
        """The (k,) 2-norms of k tensors that are sharded as the parameters, whole, in float32, or in `least`, or better."""
        dtype = torch.promote_types(tensors[0].dtype, least)
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype))
        if self.sharding is None:
            return norms
        from torch.distributed.tensor import DTensor

        mesh, placements = self.sharding
        whole: Tensor = DTensor.from_local(norms.square(), mesh, placements, run_check=False).full_tensor().sqrt()
        return whole

    def wholly(self, function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """What a function makes of k whole tensors; of shards every process makes the whole, and keeps its own."""
        if self.sharding is None:
            return [function(tensor) for tensor in tensors]
        from torch.distributed.tensor import DTensor, Replicate

        made: list[Tensor] = []
        for like, tensor in zip(cast(Any, self.params), tensors, strict=True):
            mesh, size = like.device_mesh, {"shape": like.shape, "stride": like.stride()}
            whole = DTensor.from_local(tensor, mesh, like.placements, run_check=False, **size).full_tensor()
            replicated = DTensor.from_local(function(whole), mesh, [Replicate()] * mesh.ndim, run_check=False)
            made.append(replicated.redistribute(placements=like.placements).to_local())
        return made


class LayerNorms(NamedTuple):
    """Norms and ratios of k parameters, left where they were computed."""

    params: list[Tensor]
    values: Tensor | Sequence[float]
    """(3, k), or 3 numbers for k = 1: weight norm, norm of gradient or update, trust ratio."""


def batches(params: list[Tensor], *others: Sequence[Tensor]) -> list[Batch]:
    """Parameters and what goes with each (gradients, moments), sorted into batches in the order of the parameters."""
    if not params:
        return []
    columns = [list(params), *map(list, others)]
    shardings: list[Sharding | None] = [None] * len(params)
    for i, param in enumerate(params):
        if type(param) not in (Parameter, Tensor) and hasattr(param, "placements"):  # a DTensor
            shardings[i] = _sharding(param)
            for column in columns:
                column[i] = _shard(column[i]) if hasattr(column[i], "placements") else column[i]
    keys = list(zip([param.device for param in params], [param.dtype for param in params], shardings, strict=True))
    if all(key == keys[0] for key in keys):  # as a rule, and it costs next to nothing
        return [Batch(list(params), columns, shardings[0])]
    found: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [
        Batch([params[i] for i in rows], [[column[i] for i in rows] for column in columns], key[2]) for key, rows in found.items()
    ]


def _sharding(param: Any) -> Sharding | None:
    """Mesh of a DTensor and the placements under which squares of its shards' norms add up; None if each process has it whole."""
    from torch.distributed.tensor import Partial, Replicate

    # Not is_shard(): that is False for the strided shards of FSDP2 over tensor parallelism.
    partial = tuple(Replicate() if placement.is_replicate() else Partial() for placement in param.placements)
    return (param.device_mesh, partial) if any(placement.is_partial() for placement in partial) else None


def _shard(tensor: Any) -> Tensor:
    """What this process holds of a DTensor."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(f"a gradient of placements {tensor.placements}: reduce it before the step; shards of a sum have no norm")
    shard: Tensor = tensor.to_local()
    return shard


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie one after the other in memory, in an order that is tensor's or channels'."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def same_layout(first: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernels, which run through memory, pair the right elements."""
    stride, dtype = first.stride(), first.dtype
    return is_dense(first) and all(other.stride() == stride and other.dtype == dtype for other in others)


def wide(tensor: Tensor) -> torch.dtype:
    """A dtype that squares of what is finite in float32 do not leave, where the device has one."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def host_norm(tensor: Tensor) -> float:
    """The 2-norm of a tensor on the CPU."""
    if tensor.dtype in (torch.float32, torch.float64) and is_dense(tensor):
        return dense_norm(tensor)
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


def dense_norm(tensor: Tensor) -> float:
    """The 2-norm of a dense tensor: BLAS is twice as fast as torch's norm where the tensor is in the cache."""
    size = tensor.numel()
    line = tensor.as_strided((size,), (1,))
    if size <= _PIECE:
        return math.sqrt(torch.dot(line, line).item())
    # In pieces, for BLAS sums in the tensor's precision.
    return math.sqrt(sum(torch.dot(piece, piece).item() for piece in torch.split(line, _PIECE)))


def note_writes(tensors: list[Tensor]) -> None:
    """Have autograd know of writes that it does not see, as it knows of those of torch's own operations."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # torch 2.4 takes one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
