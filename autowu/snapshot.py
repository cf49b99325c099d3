"""State: a copy of all that training changes, to be put back where a run has gone wrong."""

from __future__ import annotations

import copy
import math
from typing import Any, Final

import torch
from torch import Tensor

from autowu.live import Holder, Key, Label, LiveRun, is_kept, is_value, local, refers

__all__ = ["Snapshot"]

_SPARED: Final = 0.05
"""Share of a device's memory that no copy takes."""


class Snapshot:
    """What a :class:`~autowu.live.LiveRun` changes, copied into buffers that are allocated once.

    :meth:`take` makes the copy and :meth:`restore` puts it back. Both are multi-tensor operations, queued on the device and not
    waited for. Tensors are restored in place, so that DDP's buckets, FSDP2's shards, compiled code and CUDA graphs go on seeing
    them; state that the optimizer has made since is dropped. Of a sharded model each rank copies its shard. Gradients, random
    states and a GradScaler's scale are no part of it.

    Args:
        live: the run.
        device: where the copy is held: None for beside the original, or on the host where there is no room; "cpu" for the host, in
            pinned memory if the original is on a GPU.
    """

    def __init__(self, live: LiveRun, device: torch.device | None = None) -> None:
        self.live, self.device = live, device
        self.step: int | None = None
        """Optimizer steps that had been taken when the copy was made; None where there is none."""
        self.lr = 0.0
        """The LR that was to follow."""
        self.level = 0.0
        """What the loss was then."""
        self._copies: dict[Key, Tensor] = {}
        self._rest: dict[Key, Any] = {}
        self._copied: dict[Label, Tensor] | None = None  # the parameters themselves; None in a copy that was loaded
        self._from: set[torch.device] = set()  # GPUs that may still be writing copies in host memory

    @torch.no_grad()
    def take(self, step: int, lr: float = 0.0, level: float = 0.0) -> None:
        """Copy the run as it is after `step` optimizer steps, before one at `lr`, at a loss of `level`, over the copy before.

        Raises:
            MemoryError: if there is no room for it.
        """
        self.live.look_for_averages()
        parameters, tensors, rest = self.live.look()
        rest = copy.deepcopy(rest, self.live.references())
        room = self._make_room(tensors)
        self.step, self._copies = None, room  # an interrupt must not leave half a copy that passes for one
        _copy(list(self._copies.values()), list(tensors.values()))
        self._from = {t.device for key, t in tensors.items() if t.is_cuda and self._copies[key].is_cpu}
        self._rest, self._copied = rest, parameters
        self.step, self.lr, self.level = step, lr, level

    @torch.no_grad()
    def moved(self) -> Tensor:
        """Norms, (n, 2) on the device: of what each of the optimizer's parameters has moved by since the copy, and what it was."""
        norms, place = [torch.zeros(2)], self.live.place
        for label, parameter in zip(self.live.labels(), self.live.optimized(), strict=True):
            kept = self._copies.get(("parameter", label))
            if kept is not None and _fits(parameter, kept) and kept.numel() and (kept.is_floating_point() or kept.is_complex()):
                now, then = local(parameter), kept.to(parameter.device)  # one at a time, for there may be no room for more
                norms.append(torch.stack([(now - then).norm(), then.norm()]).abs().float().to(place))
        return torch.stack([norms[0].to(place), *norms[1:]])

    def misfit(self) -> str | None:
        """Why the copy, as it was loaded, cannot be put back into the run: a parameter that is missing or has another shape.

        Without `model=` no parameter has a name, and a copy that was made with it has nothing else.
        """
        if self._copied is not None:
            return None  # what was replaced since the copy was made is left as it is
        found = self._found()
        for key, kept in self._copies.items():
            if key[0] == "parameter" and not _fits(found[key[1]], kept):
                if self.live.model is None and isinstance(key[1], str):
                    return f"it has parameters by their names in the model, as {key[1]!r}, which takes the model= it was made with"
                return f"of parameter {key[1]!r}, {tuple(kept.shape)}, the run has none of that shape"
        return None

    @torch.no_grad()
    def restore(self) -> list[str]:
        """Put the copy back; the names of what it could not be put into, or did not know, and left as it is.

        Raises:
            RuntimeError: if there is no copy, or if it does not fit, see :meth:`misfit`. Nothing has been written then.
        """
        if self.step is None:
            raise RuntimeError("no snapshot was taken")
        if reason := self.misfit():
            raise RuntimeError(reason)
        self.live.look_for_averages()
        found = self._found()
        fitting = {label: p for label, p in found.items() if p is not None and _fits(p, self._copies["parameter", label])}
        pairs = [(local(p), self._copies["parameter", label]) for label, p in fitting.items()]
        left = [str(label) for label in found if label not in fitting]
        known = {id(p) for p in fitting.values()}
        left += [str(label) for label, p in self.live.parameters().items() if id(p) not in known and str(label) not in left]
        left += self._restore_buffers(pairs)
        self._restore_state(fitting, pairs)
        _copy(*([list(side) for side in zip(*pairs, strict=True)] or [[], []]))
        return [label for label in left if not self._begin_anew(label)]

    def _begin_anew(self, label: str) -> bool:
        """Have an average that is not finite, and unknown to the copy, begin again from what it averages; whether it does."""
        average = self.live.everything().get(label)
        if label not in self.live.averages() or average is None or bool(local(average).isfinite().all()):
            return False
        if (source := self.live.source_of(label)) is None:
            return False
        _copy([local(average)], [local(source)])
        return True

    def _found(self) -> dict[Label, Tensor | None]:
        """The parameters of the copy as the run has them: the same ones, or those of the same label where it was loaded.

        Whether they still train does not matter: what was frozen since the copy was made goes back with the rest.
        """
        now = self.live.everything()
        labels: list[Label] = [key[1] for key in self._copies if key[0] == "parameter"]
        if self._copied is None:
            return {label: now.get(label) for label in labels}
        alive = {id(p) for p in now.values()}
        return {label: p if id(p := self._copied[label]) in alive else None for label in labels}

    def _restore_buffers(self, pairs: list[tuple[Tensor, Tensor]]) -> list[str]:
        """Have the buffers restored with `pairs`, one of another shape now at once; the names of those that are gone."""
        model, now, left = self.live.model, self.live.buffers(), []
        modules = () if model is None else model.modules()
        owners = {id(b): (m, name) for m in modules for name, b in m.named_buffers(recurse=False)}
        for key, kept in self._copies.items():
            if key[0] != "buffer":
                continue
            buffer = now.get(key[1])
            if buffer is None:
                left.append(key[1])
            elif _fits(buffer, kept):
                pairs.append((local(buffer), kept))
            else:
                (module, name), shape = owners[id(buffer)], self._rest.get(("shape", key[1]), kept.shape)
                module._buffers[name] = kept.to(buffer.device, copy=True).expand(shape)
        more, memo = self.live.modules_with_more(), self.live.references()
        for key, value in self._rest.items():
            if key[0] == "extra" and key[1] in more:
                try:
                    more[key[1]].set_extra_state(copy.deepcopy(value, memo))
                except Exception:  # whatever a module of somebody's raises
                    left.append(key[1])
        return left

    def _restore_state(self, fitting: dict[Label, Tensor], pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Bring what the optimizer keeps of the `fitting` parameters, and of its groups, back; its tensors with `pairs`."""
        before: dict[Key, dict[str, Any]] = {}
        for key, value in (self._copies | self._rest).items():
            if key[0] in ("state", "group", "named"):
                before.setdefault(key[:3], {})[key[3]] = value
        optimizers, ours = self.live.optimizers(), {id(p): label for label, p in fitting.items()}
        on_device = [{id(p) for g in o.param_groups if _counts_on_device(g) for p in g["params"]} for o in optimizers]
        place, memo = self.live.place, self.live.references()
        for (kind, level, where), parameter, holder in list(self.live.holders()):
            if kind == "group" and (held := before.get((kind, level, where))) is not None:
                pairs += _restored(holder, held, None, place, _counts_on_device(holder), memo)
            elif kind == "named":
                held = before.pop((kind, level, where), None)
                if held is not None or (where == 0 and self._copied is not None):
                    pairs += _restored(holder, held or {}, None, place, False, memo)
                elif self._copied is not None:  # else a copy that may have been saved before such were known
                    optimizers[level].state.pop(where, None)
            elif parameter is not None and id(parameter) in ours:
                held = before.pop((kind, level, ours[id(parameter)]), None)
                if held is None:
                    del optimizers[level].state[parameter]
                else:
                    pairs += _restored(holder, held, parameter, parameter.device, id(parameter) in on_device[level], memo)
        for (kind, level, where), held in before.items():  # what the optimizer has dropped since
            if kind == "state" and where in fitting and level < len(optimizers):
                parameter, holder = fitting[where], optimizers[level].state.setdefault(fitting[where], {})
                pairs += _restored(holder, held, parameter, parameter.device, id(parameter) in on_device[level], memo)
            elif kind == "named" and level < len(optimizers):
                pairs += _restored(optimizers[level].state.setdefault(where, {}), held, None, place, False, memo)

    def free(self) -> None:
        """Give the memory back."""
        self._copies, self._rest, self._copied, self._from, self.step = {}, {}, None, set(), None

    def state_dict(self) -> dict[str, Any] | None:
        """The copy itself, on the host; None where there is none."""
        if self.step is None:
            return None
        for device in self._from:
            torch.cuda.synchronize(device)
        tensors = {key: tensor.to("cpu", copy=True) for key, tensor in self._copies.items()}
        rest = {key: value for key, value in self._rest.items() if key[0] != "named" or not refers(value)}  # of this process
        return {"step": self.step, "lr": self.lr, "level": self.level, "tensors": tensors, "rest": copy.deepcopy(rest)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Hold the copy that a :meth:`state_dict` was taken of, on the host until the next is taken."""
        self.free()
        if state is not None:
            self.step, self.lr, self.level = state["step"], state["lr"], state["level"]
            labels = self.live.labels()
            self._copies = {_named(key, labels): t.clone() for key, t in state["tensors"].items()}  # the next is made over them
            self._rest = {_named(key, labels): copy.deepcopy(value) for key, value in state["rest"].items()}
            self.live.remember(key[1] for key in self._copies if key[0] == "parameter")

    def _make_room(self, tensors: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """A buffer for each of `tensors`; those that fit are kept."""
        kept = {key: kept for key, t in tensors.items() if (kept := self._copies.get(key)) is not None and self._holds(kept, t)}
        need, place = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in kept), self.live.place
        if need and self.device is None and place.type == "cuda" and need > free_memory(place):
            self.device, kept = torch.device("cpu"), {}
            need = sum(t.numel() * t.element_size() for t in tensors.values())
        if need and (self.device or place).type == "cpu" and need > (free := free_memory(torch.device("cpu"))):
            raise MemoryError(f"a copy of {need / 1e9:.3g} GB has no room in the {free / 1e9:.3g} GB that are free")
        return {key: kept[key] if key in kept else self._room(tensor) for key, tensor in tensors.items()}

    def _holds(self, room: Tensor, tensor: Tensor) -> bool:
        return room.shape == tensor.shape and room.dtype == tensor.dtype and room.device.type == (self.device or tensor.device).type

    def _room(self, tensor: Tensor) -> Tensor:
        device = self.device or tensor.device
        return torch.empty_like(tensor, device=device, pin_memory=device.type == "cpu" and tensor.is_cuda)


def free_memory(device: torch.device) -> float:
    """Bytes that a copy may take of a device's memory: what the run has never needed so far, but for a reserve."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        return free + unused - _SPARED * total
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        return 1024 * (kilobytes["MemAvailable"] - _SPARED * kilobytes["MemTotal"])
    except (OSError, KeyError, ValueError):
        return math.inf  # there is no such file but on Linux


def _named(key: Key, labels: list[Label]) -> Key:
    """The key with the label that a parameter has here, where it was saved with its place among the optimizer's."""
    at = {"parameter": 1, "state": 2}.get(key[0])
    if at is None or not isinstance(key[at], int) or key[at] >= len(labels):
        return key
    return (*key[:at], labels[key[at]], *key[at + 1 :])


def _fits(tensor: Tensor | None, kept: Tensor) -> bool:
    return tensor is not None and local(tensor).shape == kept.shape


def _counts_on_device(group: Holder) -> bool:
    """Whether torch's optimizers count the steps of a group where its parameters are, see ``Optimizer.load_state_dict``."""
    return bool(group.get("capturable") or group.get("fused"))


def _restored(
    holder: Holder, before: dict[Any, Any], parameter: Tensor | None, device: torch.device, counts_there: bool, memo: dict[int, Any]
) -> list[tuple[Tensor, Tensor]]:
    """Bring a holder of the optimizer, of a `parameter` or none, back to what it held `before`; pairs still to be copied.

    Those are the tensors that are still there. What has to be made anew is put on `device`, but for numbers: these only if the
    optimizer `counts_there`, or the copy was made of one there. What a 0-dim parameter has beside "step" is put there, too, as
    in torch's ``Optimizer.load_state_dict``.
    """
    for name, value in [*holder.items()]:
        if name not in before and is_kept(name) and is_value(value) and not refers(value):  # else no copy has it
            del holder[name]
    pairs, is_scalar = [], parameter is not None and parameter.ndim == 0
    for name, value in before.items():
        now = holder.get(name)
        if not isinstance(value, Tensor):
            holder[name] = copy.deepcopy(value, memo)
        elif isinstance(now, Tensor) and _fits(now, value):
            pairs.append((local(now), value))
        else:
            is_moment = value.ndim > 0 or (is_scalar and name != "step")
            there = is_moment or counts_there or not value.is_cpu or value.is_pinned()
            holder[name] = value.to(device if there else "cpu", copy=True)
    return pairs


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    alike: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}  # of which many take one kernel
    for target, source in zip(targets, sources, strict=True):
        if target.is_conj() or target.is_neg():  # a view that is to be read so; many at once cannot be written
            target.copy_(source, non_blocking=True)
            continue
        key = target.device, target.dtype, source.device, source.dtype
        for tensors, one in zip(alike.setdefault(key, ([], [])), (target, source), strict=True):
            tensors.append(one)
    for pair in alike.values():
        torch._foreach_copy_(*pair, non_blocking=True)
