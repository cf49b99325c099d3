"""Norms and trust ratios, the parts that the layer-wise optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from autowu.optim._host import host_norm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

Sharding: TypeAlias = "tuple[DeviceMesh, tuple[Placement, ...]]"


class LayerStats(NamedTuple):
    """What an optimizer did to one parameter in its last step."""

    name: str
    """Its name if the optimizer was given names (:func:`~autowu.optim.param_groups` gives them), else ``"group.index"``."""
    weight_norm: float
    """Norm of the parameter before the step."""
    grad_norm: float
    """Norm of the gradient (LARS, TVLARS), or of Adam's update with its decay, which takes the gradient's place (LAMB)."""
    trust_ratio: float
    """What the gradient, or Adam's update, was multiplied by."""


class Bucket(NamedTuple):
    """Parameters of one device, dtype and sharding, column by column."""

    params: list[Tensor]
    columns: list[list[Tensor]]
    """This process's shards: of the parameters, of their gradients, and of what else was given."""
    sharding: Sharding | None
    """None where this process holds the whole tensors."""

    def pieces(self, foreach: bool) -> Iterator[Bucket]:
        """The bucket whole, for multi-tensor operations, or a parameter at a time, which keeps it in the cache meanwhile."""
        if foreach or self.sharding is not None:  # shards: all their norms in one collective
            yield self
        else:
            for i, param in enumerate(self.params):
                yield Bucket([param], [[column[i]] for column in self.columns], None)

    def on_host(self) -> bool:
        """Whether numbers of it may be read without waiting for a device."""
        return len(self.params) == 1 and self.params[0].is_cpu and self.sharding is None and not torch.compiler.is_compiling()


class LayerNorms(NamedTuple):
    """Norms and ratios of k parameters, left where they were computed."""

    params: list[Tensor]
    values: Tensor | Sequence[float]
    """(3, k), or 3 numbers for k = 1: weight norm, gradient norm, trust ratio."""


def buckets(params: list[Tensor], *others: Sequence[Tensor]) -> list[Bucket]:
    """Parameters and what goes with each (gradients, moments), sorted into buckets in the order of the parameters."""
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
        return [Bucket(list(params), columns, shardings[0])]
    found: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [
        Bucket([params[i] for i in rows], [[column[i] for i in rows] for column in columns], key[2]) for key, rows in found.items()
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


def tensor_norms(tensors: Sequence[Tensor], sharding: Sharding | None = None) -> Tensor:
    """The (k,) 2-norms of k whole tensors of one device, in float32 or better."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype))
    if sharding is None:
        return norms
    from torch.distributed.tensor import DTensor

    mesh, placements = sharding
    whole: Tensor = DTensor.from_local(norms.square(), mesh, placements, run_check=False).full_tensor().sqrt()
    return whole


def scale_(tensors: list[Tensor], scales: Tensor | float) -> None:
    """Multiply k tensors in place, by (k,) scales or by one."""
    if tensors[0].dtype == torch.float16:  # whose range a ratio may leave, though the product is within
        each: Sequence[Any] = scales.unbind() if isinstance(scales, Tensor) else [scales] * len(tensors)
        for tensor, scale in zip(tensors, each, strict=True):
            tensor.copy_(tensor.float().mul_(scale))
    else:
        torch._foreach_mul_(tensors, list(scales.to(tensors[0].dtype).unbind()) if isinstance(scales, Tensor) else scales)


def trust_ratios(bucket: Bucket, others: Sequence[Tensor], ratio: Callable[[Any, Any], Any]) -> LayerNorms:
    """Norms of the weights of a bucket and of `others`, and the ratio of the two: 1 where a norm is 0 or not a number.

    Args:
        bucket: k parameters.
        others: their gradients or updates.
        ratio: of the norm of a weight to that of its gradient or update, both above 0; for floats and for (k,) tensors.
    """
    weights = bucket.columns[0]
    if bucket.on_host():
        weight, other = host_norm(weights[0]), host_norm(others[0])
        return LayerNorms(bucket.params, (weight, other, float(ratio(weight, other)) if weight > 0 and other > 0 else 1.0))
    norms = tensor_norms([*weights, *others], bucket.sharding)
    weight_norms, other_norms = norms[: len(weights)], norms[len(weights) :]
    ratios = torch.where((weight_norms > 0) & (other_norms > 0), ratio(weight_norms, other_norms), 1.0)
    return LayerNorms(bucket.params, torch.stack((weight_norms, other_norms, ratios)))


def layer_stats(groups: Iterable[dict[str, Any]], taken: Sequence[LayerNorms]) -> list[LayerStats]:
    """Names and values of what a step has left behind, in the order of the groups."""
    values: dict[Tensor, list[float]] = {}
    by_device: dict[torch.device, list[LayerNorms]] = {}
    for norms in taken:
        if isinstance(norms.values, Tensor):
            by_device.setdefault(norms.values.device, []).append(norms)
        else:
            values[norms.params[0]] = list(norms.values)
    for several in by_device.values():  # one copy to the host a device
        columns = torch.cat([n.values for n in several if isinstance(n.values, Tensor)], dim=1).T.tolist()
        values.update(zip((param for n in several for param in n.params), columns, strict=True))
    return [
        LayerStats(group["param_names"][i] if "param_names" in group else f"{number}.{i}", *values[param])
        for number, group in enumerate(groups)
        for i, param in enumerate(group["params"])
        if param in values
    ]


def note_writes(tensors: list[Tensor]) -> None:
    """Have autograd know of writes that it does not see, as it knows of those of torch's own operations."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # torch 2.4 takes one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def check_adapt(group: dict[str, Any]) -> None:
    """Raise TypeError for an ``"adapt"`` of a group that is neither True nor False."""
    if not isinstance(group.get("adapt", True), bool):
        raise TypeError(f"adapt={group['adapt']!r}: must be True or False")


def check_dense(name: str, grad: Tensor) -> None:
    """Raise RuntimeError for a sparse gradient."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name}: a gradient of layout {grad.layout}; only dense gradients have a trust ratio")


def is_capturing() -> bool:
    """Whether a CUDA graph is captured."""
    on_cuda = not torch.compiler.is_compiling() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(on_cuda and torch.cuda.is_current_stream_capturing())


def check_capture(name: str, groups: Iterable[dict[str, Any]]) -> None:
    """Raise RuntimeError where a CUDA graph would freeze what the host counts."""
    if is_capturing() and not all(group["capturable"] for group in groups):
        raise RuntimeError(f"{name}: a step in a CUDA graph needs capturable=True, and the LR as a tensor")


def pick_foreach(foreach: bool | None, params: Sequence[Tensor]) -> bool:
    """What is asked for; if nothing is, multi-tensor operations everywhere but on the CPU, where they only cost cache."""
    return foreach if foreach is not None else not all(param.device.type == "cpu" for param in params)
