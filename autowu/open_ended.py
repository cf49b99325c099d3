"""The methods of :class:`~autowu.scheduler.AutoWU` about the end of a run: where it stands, cooldowns, extensions, branches."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from autowu.checks import count, fraction
from autowu.config import Config, cooldown_start, forked
from autowu.group_lrs import GroupLRs
from autowu.horizon import Horizon
from autowu.phases import Phase, State, base_lr, phase_at
from autowu.plans import cooled, longer, rewarmed
from autowu.stages import Rooms, Stage, WarmUp, stage_of

__all__ = ["OpenEnded"]


class OpenEnded:
    """What a scheduler can be asked about the end of its run. It says nothing of it itself: the :class:`Horizon` does."""

    config: Config
    last_epoch: int
    _state: State
    _stage: Stage
    _horizon: Horizon
    _groups: GroupLRs
    _rooms: Rooms

    @property
    def phase(self) -> Phase:
        """Phase of the coming optimizer step: "warmup", "stable", "cooldown" or "done"."""
        return phase_at(self.config, self._state, self.last_epoch)

    @property
    def should_stop(self) -> bool:
        """Whether the run is over, as a loop asks that knows no number of steps."""
        return self.phase == "done"

    @property
    def progress(self) -> float | None:
        """Share of the run that lies behind, from 0 to 1; None as long as its end is open."""
        if self.config.total_steps is None:
            return None
        return min(self.last_epoch / self.config.total_steps, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The state of the whole run."""
        raise NotImplementedError

    def _write_lrs(self) -> None:
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
            >>> import torch
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

    def extend(self, *, total_epochs: int | None = None, total_steps: int | None = None) -> None:
        """Make the run longer, from now on; with no length its end is open from here.

        The cooldown begins where the last `cooldown_fraction` of the longer run does, at the earliest now. One that has begun is
        planned anew, as where a state is loaded into a longer run: the LR may rise. To lose nothing of the steps at low LRs, load a
        checkpoint from before the cooldown first. Call it on all ranks between the same two steps.

        Args:
            total_epochs: epochs of the run in all, more than so far; for a run that has epochs.
            total_steps: steps of the run in all, more than so far.

        Raises:
            TypeError, ValueError: naming the argument, its value and its range.

        Example:
            >>> import torch
            >>> from autowu import AutoWU
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> scheduler = AutoWU(optimizer, total_steps=100)
            >>> scheduler.extend(total_steps=1000)
            >>> scheduler.config.cooldown_start
            400
        """
        counts = [None if v is None else count(n, v) for n, v in (("total_epochs", total_epochs), ("total_steps", total_steps))]
        was, config = self.phase, longer(self.config, self._state, self.last_epoch, *counts)
        self._horizon.extended(config.total_steps is None)
        self._plan(config)
        if was != "stable" and "epoch" in (stage := self._stage.state_dict()):  # one that the cooldown cut short
            self._stage.load_state_dict({**stage, "epoch": None})
        self._write_lrs()
        end = "its end is open" if config.total_steps is None else f"it has {config.total_steps} steps"
        self._rooms.log.tell("extended", self.last_epoch, f"AutoWU extends the run at step {self.last_epoch}: {end}")

    def rewarm(self, fraction: float = 0.1) -> None:
        """Search the LR again, from now on: for new data, layers that were frozen, another batch size.

        The warm-up begins anew, from a `fraction` of the present LR. It grows at the pace of the first one, until a test finds the
        minimum of the loss past; what happened above it is undone. What was known of the loss, the copies and the setbacks are
        forgotten. Call it on all ranks between the same two steps.

        Args:
            fraction: of the present LR, in (0, 1); the new peak may be lower than now, by as much at most.

        Raises:
            TypeError, ValueError: unless the fraction is in its range and the run in its stable phase.

        Example:
            >>> import torch
            >>> from autowu import AutoWU
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> scheduler = AutoWU(optimizer, max_warmup_steps=20)
            >>> for step in range(100):
            ...     optimizer.step()
            ...     scheduler.step(abs(step - 10.0))
            >>> scheduler.phase, scheduler.switch.step
            ('stable', 17)
            >>> scheduler.rewarm()
            >>> scheduler.phase
            'warmup'
        """
        config = rewarmed(self.config, self._state, self.last_epoch, fraction)
        self._groups.largest = base_lr(self.config, self._state, self.last_epoch)  # to go on with where no curve can be fitted
        self._state = State()
        self._stage = stage_of(config, self._state, self._rooms, self._groups.largest)
        self._plan(config)
        self._write_lrs()
        message = f"AutoWU searches again from step {self.last_epoch} on: LR {config.min_lr:.4g}"
        self._rooms.log.tell("rewarm", self.last_epoch, message)

    def cooldown_start(self, cooldown_fraction: float) -> int:
        """Optimizer step, from 0, at which a cooldown over the last `cooldown_fraction`, in (0, 1), of the T steps begins.

        Raises:
            TypeError, ValueError: unless the fraction is a number in its range.
        """
        return cooldown_start(self.config, cooldown_fraction)

    def fork_cooldown(self, cooldown_fraction: float | None = None, *, steps: int | None = None) -> dict[str, Any]:
        """The state, as of now, of a branch of this run with a cooldown of its own, for :meth:`load_state_dict`.

        With a length it is what a full run with that fraction would have here, and the cooldown begins in its time. With an open
        end, or with `steps`, the branch cools down from now on. It shares no memory with this run; docs/cooldown.md shows how
        several branches share warm-up and stable phase. In a process group each rank forks its own state.

        Args:
            cooldown_fraction: share of T, in (0, 1); of the steps of the branch in all where the end is open.
            steps: length of a cooldown from now on, 1 or more, in place of the fraction.

        Raises:
            TypeError: if the fraction is no number, or if not one of the two is given.
            ValueError: if one is out of its range; with `steps` or an open end, before the switch or after the end; else if this
                run has ``immediate_cooldown=True``, if it is past the step where that cooldown or its own begins (with
                ``decay_phase_stat="loss"`` one step less), or if the warm-up of a run with that fraction would have another limit.

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
        return self._branch(cooldown_fraction, steps)

    def _branch(self, cooldown_fraction: float | None, steps: int | None) -> dict[str, Any]:
        if (steps is None) == (cooldown_fraction is None):
            given = f"cooldown_fraction={cooldown_fraction!r}, steps={steps!r}"
            raise TypeError(f"{given}: give one, a fraction above 0 and below 1 or steps of 1 or more")
        if cooldown_fraction is not None and self.config.total_steps is not None:
            config = forked(self.config, self.last_epoch, cooldown_fraction)
            return copy.deepcopy(self.state_dict()) | {"config": asdict(config)}
        if cooldown_fraction is not None:
            share = fraction("cooldown_fraction", cooldown_fraction)
            steps = max(1, round(share / (1 - share) * self.last_epoch))
        steps = count("steps", steps)
        if self.phase not in ("stable", "cooldown"):
            raise ValueError(
                f"steps={steps!r}: a branch cools down from the stable phase or the cooldown, the run is in {self.phase!r}"
            )
        config = cooled(self.config, self._state, self.last_epoch, steps)
        state = copy.deepcopy(self.state_dict())
        return state | {"config": asdict(config), "horizon": state["horizon"] | {"asked": [], "moved": True}}

    def _plan(self, config: Config) -> None:
        """Go on by `config`."""
        before, self.config, self._stage.config = self.config, config, config
        if config is before or not isinstance(self._stage, WarmUp):
            return
        if config.warmup_origin + config.warmup_limit == self.last_epoch + 1:  # cut short: no LR that was not tried
            tried = base_lr(before, self._state, self.last_epoch)
            self._stage.fallback_lr = min(self._stage.fallback_lr, tried)
        if config.warmup_origin != before.warmup_origin:
            self._rooms.begin_again(config, before)
