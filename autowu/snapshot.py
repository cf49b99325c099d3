"""State: a copy of all that training changes, to be put back where a run has gone wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autowu.families import wrapped_optimizer

__all__ = ["Snapshot"]

_OF_THE_SCHEDULE = ("params", "lr", "initial_lr", "lr_scale")


class Snapshot:
    """Parameters, buffers and optimizer state of a run, copied into buffers that are allocated once.

    :meth:`take` makes the copy and :meth:`restore` puts it back. Both are multi-tensor operations, queued on the device and not
    waited for. Tensors are restored in place, so that DDP's buckets, FSDP2's shards, compiled code and CUDA graphs go on seeing
    them; state that the optimizer has made since is dropped. Of a sharded model each rank copies its shard. Gradients, random
    states and a GradScaler's scale are no part of it.

    Args:
        model: whose parameters and buffers to copy; those of the optimizer's parameter groups besides.
        optimizer: whose state to copy.
        device: where the copy is held: None for beside the original, "cpu" for the host, in pinned memory if the original is on a
            GPU.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device | None = None) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.step: int | None = None
        """Optimizer steps that had been taken when the copy was made; None where there is none."""
        self.lr = 0.0
        """The LR that was to follow."""
        self.level = 0.0
        """What the loss was then."""
        self._copies: dict[Any, Tensor] = {}
        self._rest: dict[Any, Any] = {}

    @torch.no_grad()
    def take(self, step: int, lr: float = 0.0, level: float = 0.0) -> None:
        """Copy the run as it is after `step` optimizer steps, before one at `lr`, at a loss of `level`, over the copy before."""
        tensors, rest = self._live()
        kept = self._copies
        self._copies = {
            key: kept[key] if key in kept and self._holds(kept[key], tensor) else self._room(tensor)
            for key, tensor in tensors.items()
        }
        _copy(list(self._copies.values()), list(tensors.values()))
        self._rest = copy.deepcopy(rest)
        self.step, self.lr, self.level = step, lr, level

    @property
    def place(self) -> torch.device:
        """Where what is copied lies, by the first parameter."""
        return next((parameter.device for parameter in self._parameters()), torch.device("cpu"))

    @torch.no_grad()
    def sound(self) -> Tensor:
        """Whether all that :meth:`take` would copy is finite, buffers at least no NaN: 1.0 or 0.0 on its device, (1,).

        An attention mask is a buffer with infinities.
        """
        tensors = {key: t for key, t in self._live()[0].items() if t.is_floating_point() and t.numel() > 0}
        if not tensors:  # a shard may be empty
            return torch.ones(1, dtype=torch.float64, device=self.place)
        device = next(iter(tensors.values())).device
        norms = torch._foreach_norm(list(tensors.values()), math.inf)
        is_buffer = torch.tensor([key[0] == "buffer" for key in tensors]).to(device, non_blocking=True)
        largest = torch.stack([norm.double().to(device) for norm in norms])
        return (largest.isfinite() | (is_buffer & ~largest.isnan())).all().double()[None]

    @torch.no_grad()
    def restore(self) -> int:
        """Put the copy back; how many optimizer steps had been taken when it was made.

        Raises:
            RuntimeError: if there is no copy.
        """
        if self.step is None:
            raise RuntimeError("no snapshot was taken")
        known = self._copies.keys() | self._rest.keys()
        for where, holder in self._holders():
            for name in [name for name in holder if (where, name) not in known and name not in _OF_THE_SCHEDULE]:
                del holder[name]
        parameters = self._parameters()
        for optimizer in self._optimizers():
            for parameter in parameters:
                if parameter in optimizer.state and not optimizer.state[parameter]:
                    del optimizer.state[parameter]
        tensors, _ = self._live()
        both = [key for key in self._copies if key in tensors]
        _copy([tensors[key] for key in both], [self._copies[key] for key in both])
        holders = dict(self._holders())
        for (where, name), value in copy.deepcopy(self._rest).items():
            holders[where][name] = value
        return self.step

    def free(self) -> None:
        """Give the memory back."""
        self._copies, self._rest, self.step = {}, {}, None

    def state_dict(self) -> dict[str, Any] | None:
        """The copy itself, on the host; None where there is none."""
        if self.step is None:
            return None
        tensors = {key: tensor.to("cpu", copy=True) for key, tensor in self._copies.items()}
        return {"step": self.step, "lr": self.lr, "level": self.level, "tensors": tensors, "rest": copy.deepcopy(self._rest)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Hold the copy that a :meth:`state_dict` was taken of, on the host until the next is taken."""
        self.free()
        if state is not None:
            self.step, self.lr, self.level = state["step"], state["lr"], state["level"]
            self._copies = {key: tensor.clone() for key, tensor in state["tensors"].items()}  # the next copy is made over them
            self._rest = copy.deepcopy(state["rest"])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _optimizers(self) -> Iterator[Optimizer]:
        """The optimizer, and what it wraps, if that has a state of its own."""
        optimizer: Optimizer | None = self.optimizer
        seen: set[int] = set()
        while optimizer is not None:
            if id(optimizer.state) not in seen:
                seen.add(id(optimizer.state))
                yield optimizer
            optimizer = wrapped_optimizer(optimizer)

    def _holders(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The dictionaries in which the optimizer keeps what it knows, and where they stand."""
        parameters = self._parameters()
        for level, optimizer in enumerate(self._optimizers()):
            yield from (((level, k), optimizer.state[p]) for k, p in enumerate(parameters) if p in optimizer.state)
        yield from enumerate(self.optimizer.param_groups)

    def _live(self) -> tuple[dict[Any, Tensor], dict[Any, Any]]:
        """The tensors that training changes, and the rest that the optimizer keeps, by where they stand."""
        tensors: dict[Any, Tensor] = {}
        rest: dict[Any, Any] = {}
        seen: set[int] = set()
        named: list[tuple[str, str | int, Tensor]] = [
            *(("parameter", name, t) for name, t in self.model.named_parameters()),
            *(("buffer", name, t) for name, t in self.model.named_buffers()),
            *(("trained", index, t) for index, t in enumerate(self._parameters())),
        ]
        for kind, where, tensor in named:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[kind, where] = _local(tensor)
        for where, holder in self._holders():
            for name, value in holder.items():
                if isinstance(value, Tensor) and name not in _OF_THE_SCHEDULE:
                    tensors[where, name] = _local(value)
                elif name not in _OF_THE_SCHEDULE:
                    rest[where, name] = value
        return tensors, rest

    def _holds(self, room: Tensor, tensor: Tensor) -> bool:
        return room.shape == tensor.shape and room.dtype == tensor.dtype and room.device.type == (self.device or tensor.device).type

    def _room(self, tensor: Tensor) -> Tensor:
        device = self.device or tensor.device
        return torch.empty_like(tensor, device=device, pin_memory=device.type == "cpu" and tensor.is_cuda)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard.detach()


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)
