"""Edge: what a search changes, kept before it and put back after it: model, optimizer, loader, gradient scaler, random generators.

Tensors are put back in place and objects by identity, so that whatever else refers to them sees them as they were.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import queue
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from autowu.kin import everyone
from autowu.live import LiveRun, is_kept, local
from autowu.snapshot import Snapshot

__all__ = ["as_it_was", "own_copy"]

_CONTAINERS: Final = (dict, list, deque, set)
_MOST: Final = 1000
"""Elements of a container that is looked into: longer ones hold data."""
_LEAVES: Final = (
    *(Tensor, np.ndarray, str, bytes, bytearray, memoryview, int, float, complex, type, types.ModuleType, io.IOBase),
    *(threading.Thread, queue.Queue),
)
_NOT_OURS: Final = (nn.Module, Optimizer, LRScheduler)
"""What lies in a loader's reach by chance, and is put back otherwise or not at all."""
_FUNCTIONS: Final = (types.FunctionType, types.MethodType, functools.partial)
"""Below them no more than generators are looked for."""

Undo = Callable[[], object]


@contextlib.contextmanager
def as_it_was(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Any,
    scaler: Any = None,
    functions: Iterable[Any] = (),
    device: torch.device | None = None,
) -> Iterator[None]:
    """Have all as it was when the block ends, however it ends.

    Args:
        model: parameters, buffers, extra states, gradients and modes of all its modules.
        optimizer: what it and those that it wraps hold: states, groups, LRs, hooks.
        loader: its attributes and those of what it is made of, samplers and datasets say.
        scaler: a GradScaler, or None.
        functions: in whose closures there may be random generators.
        device: where the copies are held, see :class:`~autowu.snapshot.Snapshot`.

    Raises:
        MemoryError: at the start, if there is no room for the copies.
    """
    with contextlib.ExitStack() as stack:  # undone from the last to the first, each whatever becomes of the others
        stack.callback(_default_generators())
        reached = _Reached([loader])
        stack.callback(_generators([*reached.objects, *_Reached([model, *functions]).objects]))
        stack.callback(_loader(loader, reached))
        if scaler is not None:
            stack.callback(_tensors(vars(scaler).values()))
            stack.callback(_contents(_Reached([scaler]).ours))
        stack.callback(_gradients(model, optimizer))
        snapshot = Snapshot(_Whole(optimizer, model), device)
        snapshot.take(0)
        stack.callback(snapshot.restore)
        optimizers = everyone(optimizer)
        schedules = [group for each in optimizers for group in each.param_groups]
        stack.callback(_tensors(value for group in schedules for name, value in group.items() if not is_kept(name)))
        stack.callback(_contents(_Reached(optimizers, most=None).ours))
        stack.callback(_modes_and_buffers(model))
        yield


def own_copy(loader: Any) -> Any:
    """The loader itself, or, of an iterator whose position cannot be put back, a copy to draw from.

    Raises:
        TypeError: if it is an iterator that can be neither put back nor copied.
    """
    if not isinstance(loader, Iterator) or hasattr(loader, "load_state_dict"):
        return loader
    reached = _Reached([loader])
    if hasattr(loader, "__dict__") and not any(isinstance(inner, Iterator) for inner in reached.left):
        return loader
    try:
        return copy.deepcopy(loader)
    except Exception as error:
        cure = "pass the loader itself, or a list of batches"
        raise TypeError(f"loader={loader!r}: the position of this iterator cannot be put back ({error}); {cure}") from None


class _Whole(LiveRun):
    """A run of which everything is copied: what does not train may still change, as an average of the weights does."""

    def begin(self) -> None:
        self._frozen, self._moving = {}, set(self.everything())


class _Reached:
    """What can be reached from some objects, by attributes, elements and closures.

    Attributes:
        objects: all of it.
        ours: what holds something that can be put back: objects with attributes, and containers, but none of a function.
        left: what cannot be looked into.
    """

    def __init__(self, roots: Iterable[Any], most: int | None = _MOST) -> None:
        self.objects: list[Any] = []
        self.ours: list[Any] = []
        self.left: list[Any] = []
        self._most = most
        self._seen: set[int] = set()
        waiting = deque((root, True) for root in roots)
        first = {id(root) for root, _ in waiting}
        while waiting:
            each, ours = waiting.popleft()
            if each is None or isinstance(each, _LEAVES) or id(each) in self._seen:
                if isinstance(each, io.IOBase):
                    self.left.append(each)
                continue
            self._seen.add(id(each))
            self.objects.append(each)
            if isinstance(each, Iterator) and id(each) not in first:
                self.left.append(each)  # another's position, perhaps with threads of its own
                continue
            ours = id(each) in first or (ours and not isinstance(each, _NOT_OURS))
            inside = self._inside(each, ours)
            if ours and not isinstance(each, _FUNCTIONS):
                waiting.extendleft((inner, True) for inner in inside)  # first: what functions hold may be ours by another way
            else:
                waiting.extend((inner, False) for inner in inside)

    def _inside(self, each: Any, ours: bool) -> list[Any]:
        """What `each` holds."""
        if isinstance(each, types.FunctionType):
            defaults = (*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values())
            return [*defaults, *(cell.cell_contents for cell in each.__closure__ or () if _is_full(cell))]
        if isinstance(each, types.MethodType):
            return [each.__self__]
        if isinstance(each, functools.partial):
            return [each.func, *each.args, *each.keywords.values()]
        if isinstance(each, (*_CONTAINERS, tuple, frozenset)):
            if self._most is not None and len(each) > self._most:
                return []
            if ours and isinstance(each, _CONTAINERS):
                self.ours.append(each)
            return list(each.values() if isinstance(each, dict) else each)
        if not hasattr(each, "__dict__") or isinstance(each, random.Random):
            return []
        if ours and not isinstance(each, types.BuiltinFunctionType):
            self.ours.append(each)
        return list(vars(each).values())


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _contents(holders: Iterable[Any]) -> Undo:
    """Keep what each holder holds, by identity."""
    kept = [(where, _plain_copy(where)) for where in (h if isinstance(h, _CONTAINERS) else vars(h) for h in holders)]

    def undo() -> None:
        for where, before in kept:
            if not _same(where, before):
                where.clear()
                (where.extend if isinstance(where, (list, deque)) else where.update)(before)

    return undo


def _plain_copy(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(a is b and now[a] is before[b] for a, b in zip(now, before, strict=True))
    return bool(now == before) if isinstance(now, set) else all(a is b for a, b in zip(now, before, strict=True))


@torch.no_grad()
def _tensors(values: Iterable[Any]) -> Undo:
    """Keep the values of tensors."""
    kept = [(local(value), local(value).clone()) for value in values if isinstance(value, Tensor)]

    @torch.no_grad()
    def undo() -> None:
        for tensor, before in kept:
            tensor.copy_(before)

    return undo


def _gradients(model: nn.Module, optimizer: Optimizer) -> Undo:
    """Keep the gradients, and what wants one."""
    parameters = [*LiveRun(optimizer, model).everything().values()]
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    values = _tensors(p.grad for p in parameters)

    def undo() -> None:
        for parameter, wants, grad in before:
            if parameter.requires_grad != wants:
                parameter.requires_grad_(wants)
            parameter.grad = grad
        values()

    return undo


def _modes_and_buffers(model: nn.Module) -> Undo:
    """Keep the mode of each module, and which tensors are its buffers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = _contents([module._buffers for module, _ in modes])

    def undo() -> None:
        buffers()
        for module, training in modes:
            module.training = training

    return undo


def _default_generators() -> Undo:
    """Keep those that are drawn from where none is named: of Python, numpy, torch, and the devices in use."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    devices: list[tuple[Any, list[Tensor]]] = []
    for name in ("cuda", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available() and backend.is_initialized():
            devices.append((backend, backend.get_rng_state_all()))
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def undo() -> None:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for backend, states in devices:
            backend.set_rng_state_all(states)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return undo


def _generators(objects: Iterable[Any]) -> Undo:
    """Keep the state of each generator among them."""
    undos: list[Undo] = []
    for each in objects:
        if isinstance(each, torch.Generator):
            undos.append(functools.partial(each.set_state, each.get_state()))
        elif isinstance(each, np.random.Generator):
            undos.append(functools.partial(setattr, each.bit_generator, "state", each.bit_generator.state))
        elif isinstance(each, np.random.RandomState):
            undos.append(functools.partial(each.set_state, each.get_state()))
        elif isinstance(each, random.Random):
            undos.append(functools.partial(each.setstate, each.getstate()))
    return lambda: [undo() for undo in undos]


def _loader(loader: Any, reached: _Reached) -> Undo:
    """Keep where a loader stands: its attributes and its parts', and what has a state of its own that they may not show."""
    attributes = _contents(reached.ours)
    numbers = [(vars(h), {k: v for k, v in vars(h).items() if _is_plain(v)}) for h in reached.ours if hasattr(h, "__dict__")]
    states: list[tuple[Any, Any]] = []
    for each in {id(each): each for each in (loader, *reached.ours)}.values():
        if isinstance(each, DataLoader):
            vars(each)["_iterator"] = None  # persistent workers go on with what they were doing
        elif hasattr(each, "state_dict") and hasattr(each, "load_state_dict"):
            with contextlib.suppress(Exception):
                states.append((each, copy.deepcopy(each.state_dict())))

    def undo() -> None:
        attributes()
        for each, state in states:
            each.load_state_dict(state)
        for holder, plain in numbers if states else ():  # some load a state as what is to be gone on with
            holder.update(plain)

    return undo


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
