"""The methods of :class:`~autowu.scheduler.AutoWU` that speak of the end of a run: cooldowns that are asked for, and branches."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from autowu.config import Config, cooldown_start, forked
from autowu.horizon import Horizon
from autowu.phases import State, base_lr
from autowu.stages import Stage, WarmUp

__all__ = ["OpenEnded"]


class OpenEnded:
    """What a scheduler can be asked about the end of its run. It says nothing of it itself: the :class:`Horizon` does."""

    config: Config
    last_epoch: int
    _state: State
    _stage: Stage
    _horizon: Horizon

    def state_dict(self) -> dict[str, Any]:
        """The state of the whole run."""
        raise NotImplementedError

    def start_cooldown(self, steps: int | None = None, *, fraction: float | None = None) -> None:
        """Ask for the cooldown: from the next step on the LR decays over `steps` steps, then the run is over.

        Sets a flag only, so that a signal handler, a thread or a callback may call it. In a warm-up the search ends with what is
        known of the LR. A run with a length ends no later for it, and a cooldown that is under way can only become shorter. In a
        process group a run that was built without a length follows whichever rank is asked, one step later; one with a length must
        be asked on all ranks between the same two steps.

        Args:
            steps: length of the cooldown, 1 or more.
            fraction: the same as a share, in (0, 1], of the steps taken so far.

        Raises:
            TypeError, ValueError: unless one of the two is given, in its range.

        Example:
            >>> from autowu import AutoWU
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> scheduler = AutoWU(optimizer, max_warmup_steps=20)
            >>> while scheduler.phase != "done":
            ...     if scheduler.last_epoch == 50:
            ...         scheduler.start_cooldown(10)
            ...     optimizer.step()
            ...     scheduler.step(1.0)
            >>> scheduler.last_epoch
            61
        """
        self._horizon.ask(self.last_epoch, steps, fraction)

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

    def _plan(self, config: Config) -> None:
        """Go on by `config`."""
        if config is self.config:
            return
        if isinstance(self._stage, WarmUp) and config.warmup_limit < self.config.warmup_limit:  # no LR that was not tried
            tried = base_lr(self.config, self._state, self.last_epoch)
            self._stage.fallback_lr = min(self._stage.fallback_lr, tried)
        self.config = self._stage.config = config
