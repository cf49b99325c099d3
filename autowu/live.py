"""Edge: all that training changes in a run: parameters, what the optimizer keeps and, where a model is given, its buffers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autowu.kin import everyone

__all__ = ["Holder", "Key", "Label", "LiveRun", "Seen", "is_kept", "is_value", "local", "refers"]

Label: TypeAlias = "str | int"
"""Of a parameter: its name in the model, else its place among those of the optimizer."""
Key: TypeAlias = "tuple[Any, ...]"
"""Where something stands: ("parameter", label), ("buffer", name), ("extra", module), or the place of a holder and a name in it."""

Holder: TypeAlias = "MutableMapping[Any, Any]"
"""What the optimizer keeps things in by their names: the state of a parameter, a group, or all that is neither."""

_OF_THE_SCHEDULE: Final = ("params", "lr", "initial_lr", "lr_scale")
_WRAPPER: Final = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")
"""What DDP, torch.compile, FSDP and activation checkpointing put into the names of parameters."""
_NORMED: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Seen(NamedTuple):
    """What a run was found to change."""

    parameters: dict[Label, Tensor]
    """Those that change."""
    tensors: dict[Key, Tensor]
    """All tensors that change, these parameters among them: of a distributed one this rank's shard."""
    rest: dict[Key, Any]
    """All else."""


class LiveRun:
    """What a run changes as it trains, found anew at each call, for groups, parameters and state may be added or replaced.

    Of a parameter that does not train (the frozen base of an adapter) nothing is found, unless it has changed since the run began
    (an average of the weights). One of the optimizer's that was ever seen to train does, for layers may take turns.

    Args:
        optimizer: whose parameters and state, and those of what it wraps.
        model: whose buffers, names, and other parameters; None for those of the optimizer alone.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None = None) -> None:
        self.optimizer, self.model = optimizer, model
        self._ever: set[Label] = set()  # those of the optimizer's parameters that were seen to train
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """The run begins here, or goes on: what does not train and keeps its value from here on is frozen."""
        optimizers = self.optimizers()
        labelled = self._labelled(optimizers)
        trained = self._trained(labelled, optimizers)
        frozen = {label: local(p) for label, p in labelled.items() if label not in trained and _can_be_normed(p)}
        self._frozen = dict(zip(frozen, torch._foreach_norm(list(frozen.values()), 1), strict=True)) if frozen else {}
        self._moving: set[Label] = set()

    def remember(self, trained: Iterable[Label]) -> None:
        """Count these of the optimizer's parameters as seen to train: a copy that was saved has them."""
        self._ever |= {*trained}

    def optimizers(self) -> list[Optimizer]:
        """The optimizer, and what it wraps, one in the other; of one that steps several these before it."""
        return [optimizer for optimizer in everyone(self.optimizer) if hasattr(optimizer, "state")]

    def optimized(self) -> list[Tensor]:
        """The optimizer's parameters, those of its first group first."""
        return _optimized(self.optimizers())

    def is_of_another_model(self) -> bool:
        """Whether the optimizer has none of the parameters of the model that was given."""
        own = set() if self.model is None else {id(p) for p in self.model.parameters()}
        return bool(own) and own.isdisjoint(id(p) for p in self.optimized())

    def labels(self) -> list[Label]:
        """Those of the optimizer's parameters, in their order."""
        labels = {id(p): label for label, p in self.everything().items()}
        return [labels[id(p)] for p in self.optimized()]

    def parameters(self) -> dict[Label, Tensor]:
        """The parameters that change."""
        optimizers = self.optimizers()
        return self._changing(self._labelled(optimizers), optimizers)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the model, but for those of :meth:`uncopied`."""
        return {name: buffer for name, buffer in self._buffers().items() if _can_be_copied(buffer)}

    def uncopied(self) -> list[str]:
        """The buffers that cannot be copied: sparse ones, nested ones, those without values."""
        return [name for name, buffer in self._buffers().items() if not _can_be_copied(buffer)]

    def _buffers(self) -> dict[str, Tensor]:
        return {} if self.model is None else _bare(dict(self.model.named_buffers()))

    def look(self) -> Seen:
        """All that changes, as it is now; nothing is copied."""
        optimizers = self.optimizers()
        labelled = self._labelled(optimizers)
        parameters = self._changing(labelled, optimizers)
        tensors: dict[Key, Tensor] = {("parameter", label): local(p) for label, p in parameters.items()}
        buffers = self.buffers()
        tensors |= {("buffer", name): local(t) for name, t in buffers.items()}
        rest: dict[Key, Any] = {("extra", name): module.get_extra_state() for name, module in self.modules_with_more().items()}
        for name, buffer in buffers.items():
            if buffer.shape != tensors["buffer", name].shape and not hasattr(buffer, "to_local"):
                rest["shape", name] = tuple(buffer.shape)  # of an expanded one
        for where, _, holder in _holders(labelled, optimizers):
            for name, value in holder.items():
                if not is_kept(name) or by_reference(value) or (where[0] == "named" and not is_value(value)):
                    continue
                key = (*where, name)  # a name: mypy takes a star within [] for one of Python 3.11
                if isinstance(value, Tensor):
                    tensors[key] = local(value)
                else:
                    rest[key] = value
        return Seen(parameters, tensors, rest)

    @torch.no_grad()
    def look_for_averages(self) -> None:
        """Find the frozen parameters that have changed; waits for the device where there are any frozen ones."""
        if not self._frozen:
            return
        optimizers = self.optimizers()
        labelled = self._labelled(optimizers)
        trained = self._trained(labelled, optimizers)
        now = {label: p for label, p in labelled.items() if label in self._frozen and label not in trained}
        if now:
            norms = torch._foreach_norm([local(p) for p in now.values()], 1)
            differ = torch.stack([(norm != self._frozen[label]).cpu() for label, norm in zip(now, norms, strict=True)])
            self._moving = {label for label, moved in zip(now, differ.tolist(), strict=True) if moved}

    def averages(self) -> set[Label]:
        """The frozen parameters that were seen to change."""
        return self._moving

    def source_of(self, average: Label) -> Tensor | None:
        """What a frozen parameter is an average of: of its shape, with the name that ends alike for longest; None if unclear."""
        optimizers = self.optimizers()
        labelled = self._labelled(optimizers)
        shape, best, found = labelled[average].shape, 0, []
        for label, parameter in self._trained(labelled, optimizers).items():
            alike = _alike(str(label), str(average)) if parameter.shape == shape else 0
            if alike > best:
                best, found = alike, [parameter]
            elif alike == best:
                found.append(parameter)
        return found[0] if best and len(found) == 1 else None

    def holders(self) -> Iterator[tuple[Key, Tensor | None, Holder]]:
        """Where each holder stands, of which parameter it is, and itself."""
        optimizers = self.optimizers()
        return _holders(self._labelled(optimizers), optimizers)

    def modules_with_more(self) -> dict[str, nn.Module]:
        """The modules that have an extra state."""
        modules = {} if self.model is None else _bare(dict(self.model.named_modules()))
        own = {name: (type(m).get_extra_state, type(m).set_extra_state) for name, m in modules.items()}
        none = nn.Module.get_extra_state, nn.Module.set_extra_state
        return {name: m for name, m in modules.items() if own[name][0] is not none[0] and own[name][1] is not none[1]}

    def references(self) -> dict[int, Any]:
        """What is referred to and no part of a copy, by its identity, as ``copy.deepcopy`` takes it: modules, parameters."""
        model, optimizers = self.model, self.optimizers()
        of_model = () if model is None else (*model.modules(), *model.parameters())
        return {id(one): one for one in (*of_model, *_optimized(optimizers), *optimizers)}

    @torch.no_grad()
    def sound(self) -> Tensor:
        """Whether all tensors are finite, buffers at least no NaN: 1.0 or 0.0 on their device, (1,).

        An attention mask is a buffer with infinities.
        """
        alike: dict[tuple[Any, ...], list[Tensor]] = {}  # of which many take one kernel
        for key, tensor in self.look().tensors.items():
            if _is_inexact(tensor) and tensor.numel() > 0:
                may_be_infinite = key[0] in ("buffer", "named")  # as masks are, or a lowest loss that was never seen
                alike.setdefault((tensor.device, tensor.dtype, may_be_infinite), []).append(_normed(tensor))
        if not alike:  # a shard may be empty
            return torch.ones(1, dtype=torch.float64, device=self.place)
        device, *_ = next(iter(alike))
        sound = []
        for (_, _, may_be_infinite), tensors in alike.items():
            largest = torch.stack(torch._foreach_norm(tensors, math.inf))
            sound.append((~largest.isnan() if may_be_infinite else largest.isfinite()).all().to(device))
        return torch.stack(sound).all().to(torch.float32 if device.type == "mps" else torch.float64)[None]

    @property
    def place(self) -> torch.device:
        """Where what changes lies, by the first parameter."""
        groups = (group for optimizer in self.optimizers() for group in optimizer.param_groups)
        return next((parameter.device for group in groups for parameter in group["params"]), torch.device("cpu"))

    def everything(self) -> dict[Label, Tensor]:
        """All parameters, each once, whether they change or not."""
        return self._labelled(self.optimizers())

    def _labelled(self, optimizers: list[Optimizer]) -> dict[Label, Tensor]:
        named = {} if self.model is None else _bare(dict(self.model.named_parameters()))
        labelled: dict[Label, Tensor] = {}
        labelled.update(named)
        seen = {id(p) for p in named.values()}
        return labelled | {index: p for index, p in enumerate(_optimized(optimizers)) if id(p) not in seen}

    def _trained(self, labelled: dict[Label, Tensor], optimizers: list[Optimizer]) -> dict[Label, Tensor]:
        """Those parameters that are trained: that want gradients, or did, or of which an optimizer keeps a state."""
        states = [optimizer.state for optimizer in optimizers]
        trained = {
            label: p
            for label, p in labelled.items()
            if p.requires_grad or label in self._ever or any(p in state for state in states)
        }
        if new := trained.keys() - self._ever:
            optimized = {id(p) for p in _optimized(optimizers)}
            self._ever |= {label for label in new if id(trained[label]) in optimized}
        return trained

    def _changing(self, labelled: dict[Label, Tensor], optimizers: list[Optimizer]) -> dict[Label, Tensor]:
        trained = self._trained(labelled, optimizers)
        return trained | {label: labelled[label] for label in self._moving if label in labelled} if self._moving else trained


def _optimized(optimizers: list[Optimizer]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found.update((id(p), p) for p in group["params"] if id(p) not in found)
    return list(found.values())


class _Irregular(MutableMapping[Any, Any]):
    """What an optimizer keeps that is no dictionary of values, by its name, or by the label of the parameter that it is of."""

    def __init__(self, state: Any, labelled: Mapping[Label, Tensor], labels: Mapping[int, Label]) -> None:
        self._state, self._labelled = state, labelled
        self._keys: dict[Any, Any] = {}  # by which the optimizer knows the names
        for key, value in state.items():
            if isinstance(key, Tensor):
                if id(key) in labels and not isinstance(value, dict):
                    self._keys["parameter", labels[id(key)]] = key
            elif isinstance(key, (str, int)) and not _is_named(value):
                self._keys[key] = key

    def __getitem__(self, name: Any) -> Any:
        return self._state[self._keys[name]]

    def __setitem__(self, name: Any, value: Any) -> None:
        key = self._labelled[name[1]] if isinstance(name, tuple) else name
        self._state[self._keys.setdefault(name, key)] = value

    def __delitem__(self, name: Any) -> None:
        del self._state[self._keys.pop(name)]

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._keys])

    def __len__(self) -> int:
        return len(self._keys)


def _is_named(value: Any) -> bool:
    """Whether what an optimizer keeps under a name is a dictionary that is followed entry by entry."""
    return isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value)


def is_value(value: Any) -> bool:
    """Whether a value is one that can be copied: a number, a word, a dense tensor that is no parameter, or made of such."""
    if isinstance(value, Tensor):
        return _can_be_copied(value) and not isinstance(value, nn.Parameter)
    if isinstance(value, Mapping):
        return all(isinstance(key, Tensor) or is_value(key) for key in value) and all(map(is_value, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_value, value))
    return isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def _holders(labelled: dict[Label, Tensor], optimizers: list[Optimizer]) -> Iterator[tuple[Key, Tensor | None, Holder]]:
    labels = {id(p): label for label, p in labelled.items()}
    seen: set[int] = set()
    states: list[Any] = []  # several may share one
    for level, optimizer in enumerate(optimizers):
        places: list[tuple[Key, Tensor | None, Any]] = [
            (("state", level, labels[id(p)]), p, state)
            for p, state in optimizer.state.items()
            if isinstance(p, Tensor) and id(p) in labels
        ]
        places += [(("group", level, index), None, group) for index, group in enumerate(optimizer.param_groups)]
        if all(optimizer.state is not state for state in states):
            states.append(optimizer.state)
            named = {name: value for name, value in optimizer.state.items() if isinstance(name, str) and _is_named(value)}
            places += [(("named", level, name), None, value) for name, value in named.items()]
            places.append((("named", level, 0), None, _Irregular(optimizer.state, labelled, labels)))
        for where, parameter, holder in places:
            if isinstance(holder, _Irregular):  # made for this look, so that its identity says nothing
                yield where, parameter, holder
            elif id(holder) not in seen and isinstance(holder, dict):
                seen.add(id(holder))
                yield where, parameter, holder


def _alike(name: str, other: str) -> int:
    """How many parts of two names are the same, from their ends."""
    number = 0
    for one, two in zip(reversed(name.split(".")), reversed(other.split(".")), strict=False):
        if one != two:
            break
        number += 1
    return number


def by_reference(value: Any) -> bool:
    """Whether what a holder keeps is no value of the optimizer's but something that it refers to."""
    return isinstance(value, (nn.Module, Optimizer)) or callable(value)


def refers(value: Any) -> bool:
    """Whether there is such a thing, or a parameter, in a value or in what it is made of."""
    if isinstance(value, Mapping):
        return any(isinstance(key, Tensor) or refers(key) for key in value) or any(map(refers, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(refers, value))
    return isinstance(value, nn.Parameter) or by_reference(value)


def is_kept(name: str) -> bool:
    """Whether what a holder keeps by this name is the optimizer's, not the schedule's."""
    return name not in _OF_THE_SCHEDULE


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor; of an expanded one the part that is in memory."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if shard.layout == torch.strided and 0 in (strides := shard.stride()):
        for dim, stride in enumerate(strides):
            shard = shard.narrow(dim, 0, min(1, shard.shape[dim])) if stride == 0 else shard
    return shard.detach()


def _bare(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named` without the names of wrappers, unless two would then be called the same."""
    bare = {_WRAPPER.sub("", name): value for name, value in named.items()}
    return bare if len(bare) == len(named) else dict(named)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _can_be_copied(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _can_be_normed(tensor: Tensor) -> bool:
    return tensor.dtype in _NORMED and tensor.numel() > 0 and not tensor.is_meta


def _normed(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that norms are computed of."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype in _NORMED else tensor.float()
