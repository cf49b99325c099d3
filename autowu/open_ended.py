"""The methods of :class:`~autowu.scheduler.AutoWU` about the end of a run: where it stands, cooldowns, extensions, branches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from autowu.after_switch import AfterSwitch
from autowu.checks import count, one_of
from autowu.config import Config, cooldown_start
from autowu.events import in_words
from autowu.horizon import Horizon
from autowu.phases import State, all_lrs, batch_changed, each_config, each_lr, lower, phase_at
from autowu.plans import rewarmed
from autowu.stages import Rooms, Stage
from autowu.warm_up import WarmUp, stage_of

__all__ = ["OpenEnded"]

_RULE = one_of("sqrt", "linear")


class OpenEnded:
    """What a scheduler can be asked about the end of its run. It says nothing of it itself: the :class:`Horizon` does."""

    config: Config
    last_epoch: int
    _state: State
    _stage: Stage
    _horizon: Horizon
    _groups: Any  # the room of one optimizer or of several, which differ in what an LR is
    _rooms: Rooms

    @property
    def should_stop(self) -> bool:
        """Whether the run is over, as a loop asks that knows no number of steps."""
        return phase_at(self.config, self._state, self.last_epoch) == "done"

    @property
    def progress(self) -> float | None:
        """Share of the run that lies behind, from 0 to 1; None as long as its end is open."""
        if self.should_stop:
            return 1.0
        if self.config.budget is not None:
            return min(self._horizon.budget.used / self.config.budget[1], 1.0)
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the clock of a run with `total_seconds` stands still: for evaluations or checkpoints that are not to count.

        Example:
            >>> import torch
            >>> from autowu import AutoWU
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> scheduler = AutoWU(optimizer, total_seconds=3600)
            >>> with scheduler.paused():
            ...     pass  # evaluate
        """
        with self._horizon.budget.paused():
            yield

    def extend(
        self,
        *,
        total_epochs: int | None = None,
        total_steps: int | None = None,
        total_samples: int | None = None,
        total_tokens: int | None = None,
        total_seconds: float | None = None,
    ) -> None:
        """Make the run longer, from now on; with no length its end is open from here.

        The cooldown begins where the last `cooldown_fraction` of the longer run does, at the earliest now. One that has begun is
        planned anew, as where a state is loaded into a longer run: the LR may rise. To lose nothing of the steps at low LRs, load a
        checkpoint from before the cooldown first. Call it on all ranks between the same two steps.

        Args:
            total_epochs: epochs of the run in all, more than so far; for a run that has epochs.
            total_steps: steps of the run in all, more than so far.
            total_samples: a larger budget in all; for a run that has one of samples.
            total_tokens: likewise of tokens.
            total_seconds: likewise of seconds.

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
        lengths: dict[str, float | None] = {"total_epochs": total_epochs, "total_steps": total_steps}
        lengths |= {"total_samples": total_samples, "total_tokens": total_tokens, "total_seconds": total_seconds}
        self._extend(lengths)

    def _extend(self, lengths: Mapping[str, Any]) -> None:
        was = phase_at(self.config, self._state, self.last_epoch)
        self._plan(self._horizon.longer(self.config, self._state, self.last_epoch, lengths))
        if was != "stable" and "epoch" in (stage := self._stage.state_dict()):  # one that the cooldown cut short
            self._stage.load_state_dict({**stage, "epoch": None, "plateau": None})
        self._state = replace(self._state, settled=False)
        self._state = self._stage.watch_again(self.last_epoch, self._state)
        self._write_lrs()
        given = ", ".join(f"{name}={value}" for name, value in lengths.items() if value is not None) or "its end is open"
        self._rooms.log.tell("extended", self.last_epoch, f"AutoWU extends the run at step {self.last_epoch}: {given}")

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
            >>> for step in range(50):
            ...     optimizer.step()
            ...     scheduler.step(1 + abs(min(step, 20) - 10.0))
            >>> scheduler.phase
            'stable'
            >>> scheduler.rewarm()
            >>> scheduler.phase
            'warmup'
        """
        config = rewarmed(self.config, replace(self._state, ramp=None), self.last_epoch, fraction)
        if self._state.ramp is not None and isinstance(self._stage, AfterSwitch):
            self._state = self._stage.second_look.end(self.last_epoch, self._state)
        self._groups.largest = all_lrs(self.config, self._state, self.last_epoch)  # to go on with where no curve can be fitted
        self._state = State(start_loss=self._state.start_loss, batch=self._state.batch, again=True)
        self._stage = stage_of(config, self._state, self._rooms, self._groups.largest)
        self._plan(config)
        self._write_lrs()
        lrs = in_words([one.min_lr for one in each_config(config)])
        message = f"AutoWU searches again from step {self.last_epoch} on: LR {lrs}"
        self._rooms.log.tell("rewarm", self.last_epoch, message)

    def batch_size(self, size: int, rule: str = "sqrt") -> None:
        """Have the LR follow the batch size: the coming steps take batches of `size`.

        The first call tells the size so far and changes nothing; nor does one in a warm-up, which searches the LR at whatever size.
        Every later one scales the LR of all groups by the ratio of the sizes, or by its square root. It may come at every step.
        Call it on all ranks between the same two steps. Where no rule is to be trusted, :meth:`rewarm` searches the LR again.

        Args:
            size: samples, or tokens, of an optimizer step, 1 or more, over all ranks or of one: only ratios count.
            rule: "sqrt", or "linear", which suits SGD as long as the noise of its gradients is what limits the LR.

        Raises:
            TypeError, ValueError: naming the argument, its value and its range.

        Example:
            >>> import torch
            >>> from autowu import AutoWU
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> scheduler = AutoWU(optimizer, max_warmup_steps=20)
            >>> scheduler.batch_size(32)
            >>> for _ in range(50):
            ...     optimizer.step()
            ...     scheduler.step(1.0)
            >>> before = scheduler.lr_at(50)
            >>> scheduler.batch_size(128, rule="linear")
            >>> scheduler.lr_at(50) / before
            4.0
        """
        size, rule = count("size", size), _RULE("rule", rule)
        before = self._state
        self._state = batch_changed(self.config, before, self.last_epoch, size, rule)
        if self._state.batch_factor != before.batch_factor:
            self._rooms.record.steer(self.last_epoch, self.config, before, self.config, self._state)
            lrs = in_words(each_lr(all_lrs(self.config, self._state, self.last_epoch)))
            self._rooms.log.say(f"AutoWU, step {self.last_epoch}: batches of {size}, LR {lrs}")
            self._write_lrs()

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
            cooldown_fraction: share of T, or of the budget, in (0, 1); of the steps of the branch in all where the end is open.
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
        share_used = 0.0 if self.config.budget is None else self.progress or 0.0
        where = self.config, self._state, self.last_epoch
        config, horizon = self._horizon.branch(*where, share_used, cooldown_fraction, steps)
        return copy.deepcopy(self.state_dict()) | {"config": asdict(config), "horizon": horizon}

    def _plan(self, config: Config) -> None:
        """Go on by `config`."""
        if config is self.config:
            return
        before, self.config, self._stage.config, self._stage.busy_at = self.config, config, config, 0
        if config.budget is None:  # whose plan changes at every step
            self._rooms.record.steer(self.last_epoch, before, self._state, config, self._state)
        if not isinstance(self._stage, WarmUp):
            return
        if config.warmup_origin + config.warmup_limit == self.last_epoch + 1:  # cut short: no LR that was not tried
            tried = all_lrs(before, self._state, self.last_epoch)
            self._stage.fallback_lr = lower(self._stage.fallback_lr, tried)
        if config.warmup_origin != before.warmup_origin:
            self._rooms.begin_again(config, before)
