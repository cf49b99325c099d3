"""State: the LRs of the parameter groups: their ratios to the largest, groups that join late, tensor LRs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GroupLRs"]


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

    def of(self, lr: float) -> list[float | Tensor]:
        """The LR of each group where that of the group with the largest is `lr`."""
        return [lr * ratio for ratio in self._ratios]

    def join(self, optimizer: Optimizer) -> list[float | Tensor]:
        """Give the groups added since the last step their ratio: of their LR to the first group's now; their initial LRs."""
        groups = optimizer.param_groups
        if len(self._ratios) == len(groups):
            return []
        _part(optimizer)
        late = groups[len(self._ratios) :]
        first, default = float(groups[0]["lr"]), optimizer.defaults.get("lr")
        for group in late:
            lr = float(group["lr"])
            plain = default is not None and lr == float(default)
            ratio = 1.0 if plain or first <= 0 else lr / first
            self._ratios.append(ratio * self._ratios[0] * group.get("lr_scale", 1.0))
            group.setdefault("initial_lr", group["lr"])
        return [group["initial_lr"] for group in late]

    def write(self, optimizer: Optimizer, lr: float) -> list[float | Tensor]:
        """Set the LRs of the groups where that of the group with the largest is `lr`; copies of them."""
        written: list[float | Tensor] = []
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            own: float | Tensor = lr * ratio
            if isinstance(group["lr"], Tensor):
                own = group["lr"].fill_(own).clone()
            else:
                group["lr"] = own
            written.append(own)
        return written

    def state_dict(self) -> dict[str, Any]:
        return {"ratios": list(self._ratios), "largest": self.largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; groups that it does not know keep their ratio to the first."""
        saved = state["ratios"]
        scale = saved[0] / (self._ratios[0] or 1.0)
        self._ratios = [*saved, *(ratio * scale for ratio in self._ratios[len(saved) :])]
        self.largest = state["largest"]


def _part(optimizer: Optimizer) -> None:
    """Give every parameter group a tensor LR of its own: groups that took the optimizer's default share one."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if id(group["lr"]) in seen:
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))
