"""The end of a run and its cooldown: where the one would begin, and a branch with another."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from autowu.config import Config, cooldown_start, forked

__all__ = ["Horizon"]


class Horizon(LRScheduler):
    """The part of :class:`~autowu.AutoWU` that is about the end of the run."""

    config: Config

    def cooldown_start(self, cooldown_fraction: float) -> int:
        """Optimizer step, from 0, at which a cooldown over the last `cooldown_fraction`, in (0, 1), of the T steps begins.

        Raises:
            TypeError, ValueError: unless the fraction is a number in its range.
        """
        return cooldown_start(self.config, cooldown_fraction)

    def fork_cooldown(self, cooldown_fraction: float) -> dict[str, Any]:
        """The state, as of now, of a branch of this run with another `cooldown_fraction`, for :meth:`load_state_dict`.

        It is what a full run with that fraction would have here, and shares no memory with this run; docs/cooldown.md shows how
        several fractions share warm-up and stable phase. In a process group each rank forks its own state.

        Args:
            cooldown_fraction: share of T, in (0, 1).

        Raises:
            TypeError: if the fraction is no number.
            ValueError: if it is out of its range, if this run has ``immediate_cooldown=True``, if the run is past the step where
                that cooldown or its own begins (with ``decay_phase_stat="loss"`` one step less), or if the warm-up of a run with
                that fraction would have another limit.

        Example:
            >>> import torch
            >>> from autowu import AutoWU
            >>> def sgd():
            ...     return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> trunk = AutoWU(sgd(), total_steps=100, immediate_cooldown=False, cooldown_fraction=0.1)
            >>> for step in range(100):
            ...     if step == trunk.cooldown_start(0.4):
            ...         state = trunk.fork_cooldown(0.4)  # and copies of model and optimizer
            ...     trunk.optimizer.step()
            ...     trunk.step(1.0)
            >>> branch = AutoWU(sgd(), total_steps=100)
            >>> branch.load_state_dict(state)
            >>> branch.phase, branch.last_epoch, branch.config.cooldown_fraction
            ('cooldown', 60, 0.4)
        """
        config = forked(self.config, self.last_epoch, cooldown_fraction)
        return copy.deepcopy(self.state_dict()) | {"config": asdict(config)}
