"""What a run shows of itself: where it stands, what befell it, what its last test saw. It is read here and never set."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LRScheduler

from autowu.config import Config
from autowu.events import in_words
from autowu.gp import CurvePosterior, LossCurveGP
from autowu.history import LossHistory
from autowu.phases import Event, Phase, State, Switch, all_lrs, each_config, each_lr, phase_at
from autowu.stages import Rooms
from autowu.switching import SwitchDecision

__all__ = ["Shown"]


class Shown(LRScheduler):
    """The part of :class:`~autowu.AutoWU` that is read."""

    config: Config
    _state: State
    _rooms: Rooms

    @property
    def phase(self) -> Phase:
        """Phase of the coming optimizer step: "warmup", "stable", "cooldown" or "done"."""
        return phase_at(self.config, self._state, self.last_epoch)

    @property
    def in_ramp(self) -> bool:
        """Whether a second look at the peak LR is under way: what is evaluated now says nothing, and is to be undone."""
        return self._state.ramp is not None

    @property
    def switch(self) -> Switch | None:
        """The end of the warm-up: step, LR, probability, position of the minimum; None before it."""
        return self._state.switch

    @property
    def events(self) -> list[Event]:
        """What befell the run so far: switch, explosion, divergences, troubles."""
        return self._rooms.log.events

    @property
    def history(self) -> LossHistory:
        """The losses of the warm-up."""
        return self._rooms.judge.history

    @property
    def decision(self) -> SwitchDecision | None:
        """Outcome of the last test; None before it, and on all ranks but the first."""
        return self._rooms.judge.decision

    @property
    def posterior(self) -> CurvePosterior | None:
        """The curve as the last test saw it; None before it, and on all ranks but the first."""
        return self._rooms.judge.posterior

    @property
    def gp(self) -> LossCurveGP:
        """The engine."""
        return self._rooms.judge.gp

    @property
    def device(self) -> torch.device | None:
        """Where the GP does its sums; None for the device of the losses."""
        return self._rooms.judge.device

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that train together; None for the default group."""
        return self._rooms.ranks.group

    def lr_at(self, step: int, optimizer: int = 0) -> float:
        """LR of optimizer step `step` by all that is known now, of the parameter group with the largest LR.

        Args:
            optimizer: which, where there are several: its place in the list, from 0.

        Past the present the warm-up is taken to go on to its limit, and a stable phase to last. Of steps before a warm-up
        that was begun anew nothing is known any longer, and of those of a cooldown before it was replanned only about.
        """
        return each_lr(all_lrs(self.config, self._state, step))[optimizer]

    def __repr__(self) -> str:
        config, switch = self.config, self.switch
        found = "lr_range=" + " and ".join(f"({one.min_lr:g}, {one.max_lr:g})" for one in each_config(config))
        if switch is not None:
            found = f"switch=(step={switch.step}, lr={in_words(switch.lrs)})"
        end = "" if config.total_steps is None else f"/{config.total_steps}"
        lr = in_words(each_lr(all_lrs(config, self._state, self.last_epoch)))
        where = f"phase={self.phase!r}, step={self.last_epoch}{end}, lr={lr}"
        return f"{type(self).__name__}({where}, {found}, cooldown_type={config.cooldown_type!r}, gp={self.gp!r})"
