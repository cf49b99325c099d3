"""State: the LRs of the parameter groups: their ratios to the largest, groups that join late, LRs that are edited, tensor LRs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GroupLRs", "GroupLRsOfSeveral", "group_lrs_of"]


class GroupLRs:
    """Keeps the ratios between the LRs of an optimizer's parameter groups, with timm's ``lr_scale``.

    Attributes:
        largest: the largest LR that a group was given at first.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        _part(optimizer)
        groups = optimizer.param_groups
        initial = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self.largest = max(initial, default=0.0)
        scaled = [lr * group.get("lr_scale", 1.0) for lr, group in zip(initial, groups, strict=True)]
        top = max(scaled, default=0.0)
        self._ratios = [lr / top if top > 0 else 1.0 for lr in scaled]
        self._lr: float | None = None  # that the groups' LRs were set by; None where they may be anything
        self._set: list[float | Tensor] = []  # the very objects that were set
        self._loaded = False
        self.counts = 0, 0  # of groups: those that were known when a state was loaded, and those of the state
        self._tensors: dict[int, tuple[int, int]] = {}  # identity and version of the tensor LRs as they were set

    @property
    def resting(self) -> list[int]:
        """The groups that begin at an LR of 0 beside others that do not, and stay there until it is edited."""
        return [index for index, ratio in enumerate(self._ratios) if ratio == 0]

    def of(self, lr: float) -> list[float | Tensor]:
        """The LR of each group where that of the group with the largest is `lr`."""
        self._lr = lr
        self._tensors.clear()  # torch sets them by these
        self._set = [lr * ratio for ratio in self._ratios]
        return self._set.copy()

    def renew(self, optimizer: Optimizer, lr: float) -> list[float | Tensor] | None:
        """What :meth:`write` does, where the groups are those that are known, each with the very number that it was given.

        Returns:
            None where they are not, or where one is a tensor; then nothing is set. Most steps of a run come through here.
        """
        groups, numbers = optimizer.param_groups, self._set
        written: list[float | Tensor] = []
        if len(groups) != len(numbers):
            return None
        for group, number, ratio in zip(groups, numbers, self._ratios):  # noqa: B905  which would take twice as long
            if group["lr"] is not number:
                for before, own in zip(groups, numbers[: len(written)], strict=False):
                    before["lr"] = own
                return None
            group["lr"] = own = lr * ratio
            written.append(own)
        self._lr, self._set = lr, written
        return written

    def adopt(self, optimizer: Optimizer) -> str | None:
        """Take over the LRs that were edited since they were set last, as ratios; what is to be said of it, None where none was.

        An edit is clear where it brings a group to no more than the schedule's own LR, or sets the groups apart anew. A factor on
        all groups alike is not: the LR itself is the schedule's. A tensor LR on a device is not read, which would wait for it.
        """
        if (lr := self._lr) is None:
            return None
        edited: list[int] = []
        for index, (group, ratio) in enumerate(zip(optimizer.param_groups, self._ratios, strict=False)):
            now = group["lr"]
            if self._is_edited(index, now, lr * ratio) if isinstance(now, Tensor) else now != lr * ratio:
                edited.append(index)
        return self._adopt(optimizer, edited, lr) if edited else None

    def as_edited(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state, with what was edited since the LRs were set last; nothing is taken over yet."""
        before = self._ratios.copy()
        self.adopt(optimizer)
        state, self._ratios = self.state_dict(), before
        return state

    def _is_edited(self, index: int, now: Tensor, expected: float) -> bool:
        """Whether a tensor LR is not as it was set."""
        identity, version = self._tensors.get(index, (0, 0))
        if not now.is_cpu:
            return identity == id(now) and version != now._version
        if (identity, version) == (id(now), now._version):
            return False
        return not math.isclose(float(now), expected, rel_tol=2 * torch.finfo(now.dtype).eps)

    def _adopt(self, optimizer: Optimizer, edited: list[int], lr: float) -> str:
        groups, top = optimizer.param_groups, max(self._ratios)
        which = f"the LR of parameter group {', '.join(map(str, edited))} was set from outside"
        if any(isinstance(groups[index]["lr"], Tensor) and not groups[index]["lr"].is_cpu for index in edited):
            return f"{which}; a tensor on a device is not read, and the schedule's LR is set again"
        values = {index: float(groups[index]["lr"]) for index in edited}
        scale = lr
        if len(edited) == len(self._ratios):  # only what sets them apart is new
            scale = max(values.values()) / top if top > 0 else 0.0
        ratios = {index: value / scale if scale > 0 else math.nan for index, value in values.items()}
        clear = all(0 <= ratio <= max(top, 1.0) * (1 + 1e-6) for ratio in ratios.values())
        new = any(not math.isclose(ratio, self._ratios[index], rel_tol=1e-6) for index, ratio in ratios.items())
        if not (clear and new):
            return f"{which}, which is not kept: the LR is the schedule's, here {lr:.4g}; what can be set is a share of it"
        for index, ratio in ratios.items():
            self._ratios[index] = ratio
        kept = ", ".join(f"{ratio:.4g}" for ratio in ratios.values())
        return f"{which}; it is kept as a share of the schedule's LR: {kept}"

    @property
    def number(self) -> int:
        """Of the groups that are known."""
        return len(self._ratios)

    def join(self, optimizer: Optimizer, base_lrs: list[float | Tensor]) -> None:
        """Give the groups added since the last step their ratio: of their LR to the first group's now. `base_lrs` gets theirs."""
        groups = optimizer.param_groups
        if len(self._ratios) == len(groups):
            return
        _part(optimizer)
        late = groups[len(self._ratios) :]
        first, default = float(groups[0]["lr"]), optimizer.defaults.get("lr")
        for group in late:
            if not isinstance(group.get("lr"), (int, float, Tensor)):  # an error would end the run: as if none had been given
                group["lr"] = first
            lr = float(group["lr"])
            plain = default is not None and lr == float(default)
            ratio = 1.0 if plain or first <= 0 or not 0 <= lr < math.inf else lr / first
            self._ratios.append(ratio * self._ratios[0] * group.get("lr_scale", 1.0))
            group.setdefault("initial_lr", group["lr"])
        base_lrs += [group["initial_lr"] for group in late]

    def write(self, optimizer: Optimizer, lr: float) -> list[float | Tensor]:
        """Set the LRs of the groups where that of the group with the largest is `lr`; copies of them."""
        written: list[float | Tensor] = []
        _part(optimizer)  # a state of the optimizer that was loaded may have brought one tensor for all
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            own: float | Tensor = lr * ratio
            if isinstance(live := group["lr"], Tensor):
                own = live.fill_(own).clone()
                self._tensors[len(written)] = id(live), live._version
            else:
                group["lr"] = own
            written.append(own)
        self._set = [*written]
        # After a load the optimizer's own state may still follow, with the LRs that it was saved with.
        self._lr, self._loaded = None if self._loaded else lr, False
        return written

    def state_dict(self) -> dict[str, Any]:
        return {"ratios": list(self._ratios), "largest": self.largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; groups that it does not know keep their ratio to the first."""
        saved = state["ratios"]
        self.counts = len(self._ratios), len(saved)
        scale = saved[0] / (self._ratios[0] or 1.0)
        self._ratios = [*saved, *(ratio * scale for ratio in self._ratios[len(saved) :])]
        self.largest = state["largest"]
        self._lr, self._loaded, self._set = None, True, []

    def base_lrs(self, saved: list[Any], own: list[Any]) -> list[Any]:
        """Those that were `saved` with the state that was loaded last, then those of the groups that it does not know."""
        return [*saved, *own[len(saved) :]]


class GroupLRsOfSeveral:
    """The same of several optimizers, each with an LR of its own: it keeps a :class:`GroupLRs` for each, in their order."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        _part(*optimizers)
        self._optimizers = list(optimizers)
        self._each = [GroupLRs(optimizer) for optimizer in optimizers]

    @property
    def largest(self) -> tuple[float, ...]:
        """The largest LR that a group of each optimizer was given at first."""
        return tuple(groups.largest for groups in self._each)

    @largest.setter
    def largest(self, lrs: Sequence[float]) -> None:
        for groups, lr in zip(self._each, lrs, strict=True):
            groups.largest = lr

    @property
    def resting(self) -> list[int]:
        """As of one, counted through all optimizers."""
        begins = accumulate((groups.number for groups in self._each), initial=0)
        return [begin + index for groups, begin in zip(self._each, begins, strict=False) for index in groups.resting]

    def of(self, lrs: Sequence[float]) -> list[float | Tensor]:
        """The LR of each group, by that of each optimizer."""
        return [own for groups, lr in zip(self._each, lrs, strict=True) for own in groups.of(lr)]

    def renew(self, _: Optimizer, lrs: Sequence[float]) -> list[float | Tensor] | None:
        """As of one; None where one of them gives None, and all are to be written."""
        written: list[float | Tensor] = []
        for optimizer, groups, lr in zip(self._optimizers, self._each, lrs, strict=True):
            if (own := groups.renew(optimizer, lr)) is None:
                return None
            written += own
        return written

    def adopt(self, _: Optimizer) -> str | None:
        """As of one, told of the first optimizer whose LRs were edited."""
        told = [groups.adopt(optimizer) for optimizer, groups in zip(self._optimizers, self._each, strict=True)]
        return next((f"optimizer {index}: {words}" for index, words in enumerate(told) if words), None)

    def join(self, _: Optimizer, base_lrs: list[float | Tensor]) -> None:
        """As of one; each optimizer's groups stay together."""
        rest = _divided(base_lrs, [groups.number for groups in self._each])
        for optimizer, groups, own in zip(self._optimizers, self._each, rest, strict=True):
            groups.join(optimizer, own)
        base_lrs[:] = chain.from_iterable(rest)

    def write(self, _: Optimizer, lrs: Sequence[float]) -> list[float | Tensor]:
        """As of one."""
        each = zip(self._optimizers, self._each, lrs, strict=True)
        return [own for optimizer, groups, lr in each for own in groups.write(optimizer, lr)]

    def as_edited(self, _: Optimizer) -> dict[str, Any]:
        """As of one; that of the first, with those of the others."""
        each = zip(self._optimizers, self._each, strict=True)
        first, *others = (groups.as_edited(optimizer) for optimizer, groups in each)
        return {**first, "others": others}

    def state_dict(self) -> dict[str, Any]:
        """That of the first, with those of the others."""
        first, *others = (groups.state_dict() for groups in self._each)
        return {**first, "others": others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of one."""
        for groups, own in zip(self._each, [state, *state["others"]], strict=True):
            groups.load_state_dict(own)

    def base_lrs(self, saved: list[Any], own: list[Any]) -> list[Any]:
        """As of one."""
        known, loaded = zip(*(groups.counts for groups in self._each), strict=True)
        each = zip(self._each, _divided(saved, loaded), _divided(own, known), strict=True)
        return [lr for groups, of_state, of_run in each for lr in groups.base_lrs(of_state, of_run)]


def group_lrs_of(optimizers: Sequence[Optimizer]) -> GroupLRs | GroupLRsOfSeveral:
    """The room for one optimizer, or for several."""
    return GroupLRs(optimizers[0]) if len(optimizers) == 1 else GroupLRsOfSeveral(optimizers)


def _divided(values: list[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The next so many values for each of `counts`."""
    rest = iter(values)
    return [list(islice(rest, count)) for count in counts]


def _part(*optimizers: Optimizer) -> None:
    """Give every parameter group a tensor LR of its own: groups that took the optimizer's default share one."""
    seen: set[int] = set()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            if id(group["lr"]) in seen:
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))
