"""Several optimizers as one: their parameter groups, their states, their steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MultiOptimizer", "checked", "told"]


class MultiOptimizer(Optimizer):
    """Several optimizers, each with parameters of its own, as one: for a host that takes a single optimizer.

    A step of it is a step of each. Parameter groups and states are the optimizers' own, groups that are added to them later
    included. ``AutoWU([first, second])`` makes one, as ``scheduler.optimizer``; docs/several-optimizers.md shows its uses.

    Args:
        optimizers: one or more, in the order of :attr:`param_groups`.

    Raises:
        TypeError: if `optimizers` are no list or tuple of torch optimizers.
        ValueError: if there are none, or if two are the same or have a parameter in common.

    Example:
        >>> first, second = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.1, 0.2))
        >>> [group["lr"] for group in MultiOptimizer([first, second]).param_groups]
        [0.1, 0.2]

    Attributes:
        optimizers: they.
    """

    optimizers: list[Optimizer]
    defaults: dict[str, Any]

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Torch's constructor would make groups and a state of its own; this makes room for the hooks alone.
        self.__setstate__({"optimizers": checked("optimizers", optimizers), "defaults": {}})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups themselves, in a list of their own: add a group to one of the optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """What the optimizers keep of each parameter; what is written to it is written to them."""
        return _States(self.optimizers)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all, after one call of the closure, where there is one; what it gives back.

        Raises:
            TypeError: if one of them needs the closure for itself, as LBFGS does.
        """
        for optimizer in self.optimizers:
            if _needs_a_closure(type(optimizer)):  # type: ignore[arg-type]
                cure = "call the step of each optimizer by itself, scheduler.step(loss) once after them"
                raise TypeError(f"{type(optimizer).__name__} calls a closure of its own, several times: {cure}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: only the caller knows which of the optimizers is to have it.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"a MultiOptimizer of {len(self.optimizers)}: add the group to one of them, optimizers[0] say")

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in their order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load them.

        Raises:
            ValueError: if it is the state of another number of optimizers.
        """
        states = state_dict.get("optimizers", [state_dict])
        if len(states) != len(self.optimizers):
            raise ValueError(f"state_dict of {len(states)} optimizers: this has {len(self.optimizers)}; give it the same ones")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(map(repr, self.optimizers))}])"


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers, by parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, parameter: Tensor) -> Any:
        """The state, of one optimizer, that has the parameter; else that of the optimizer which trains it."""
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state
        for optimizer in self._optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._of(parameter)[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for optimizer in self._optimizers for parameter in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


@functools.cache
def _needs_a_closure(cls: type[Optimizer]) -> bool:
    closure = inspect.signature(cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def told(value: Any) -> str:
    """A value in one line, however an optimizer in it describes itself."""
    return " ".join(repr(value).split())


def checked(name: str, optimizers: Any) -> list[Optimizer]:
    """Optimizers, each with parameters of its own, out of a list or tuple.

    Raises:
        TypeError, ValueError: naming the argument, what is wrong, and what it may be.
    """
    if not isinstance(optimizers, list | tuple):
        raise TypeError(f"{name}={told(optimizers)}: must be a list of torch.optim.Optimizer")
    if not optimizers:
        raise ValueError(f"{name}={optimizers!r}: must be a list of one or more torch.optim.Optimizer")
    owner: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name}[{index}]={told(optimizer)}: must be a torch.optim.Optimizer")
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(f"{name}[{index}]: has no parameters; add it when it has, or leave it out")
        if any(optimizer is before for before in optimizers[:index]):
            raise ValueError(f"{name}[{index}]: is {name}[{optimizers.index(optimizer)}] again; give each once")
        mine = {id(param): param for group in optimizer.param_groups for param in group["params"]}
        for key, param in mine.items():
            if (first := owner.setdefault(key, index)) != index:
                shared = f"a parameter of shape {tuple(param.shape)} is trained by {name}[{first}] as well"
                raise ValueError(f"{name}[{index}]: {shared}; each must have parameters of its own")
    return list(optimizers)
