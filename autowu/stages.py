"""State: what the two stages of a run have in common, and the rooms that they work with.

The stages are :class:`~autowu.warm_up.WarmUp` and :class:`~autowu.after_switch.AfterSwitch`. They decide in which order things
happen in a step: the loss is kept, the watch reads it, a test is made where one is due, the run goes back to a copy where it must.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor

from autowu.config import Config, described
from autowu.events import EventLog
from autowu.first_step import FirstStep
from autowu.held_out import HeldOut
from autowu.history import LossHistory
from autowu.judge import Judge, engine
from autowu.live import LiveRun
from autowu.phases import State
from autowu.ranks import Ranks
from autowu.reader import Reader
from autowu.record import Record
from autowu.rollback import NoRollback, Rollback
from autowu.watch import LossWatch

__all__ = ["FOLDED_EVERY", "SKIPPED", "Rooms", "Stage", "fold", "rooms_of"]

FOLDED_EVERY: Final = 512
"""Steps: what is staged must outlast a block, should it be read in blocks from now on."""
SKIPPED: Final = 20
"""Calls without an optimizer step after which the loss is looked at."""


@dataclass(frozen=True)
class Rooms:
    """What both stages work with."""

    ranks: Ranks
    log: EventLog
    judge: Judge
    reader: Reader
    rollback: NoRollback
    held_out: HeldOut
    record: Record = field(default_factory=Record)
    first_step: FirstStep | None = None

    def named(self) -> dict[str, Any]:
        """What saves and loads itself, by the name under which it is saved."""
        named = {"judge": self.judge, "events": self.log, "reader": self.reader, "snapshot": self.rollback}
        return named | {"record": self.record, "held_out": self.held_out}

    def compare(self, config: Config, step: int) -> None:
        """Learn, once, whether all ranks were given the same arguments, after `step` steps; all come, whatever they were given.

        Raises:
            ValueError: if not, on all ranks alike.
        """
        if self.ranks.compared:
            return
        goes_back = isinstance(self.rollback, Rollback)
        own = {"last_epoch": step, "gp": type(self.judge.gp).__name__, "rollback": goes_back}
        own["looks at the first step"] = self.first_step is not None and self.first_step.asks
        self.ranks.compare(described(config) | own)

    def after_first_step(self, config: Config) -> Config:
        """The plan of a run that has taken its first step, whose loss is still to come."""
        after = config if self.first_step is None else self.first_step.plan(config)
        if after is not config:
            self.judge.begin(after, config)
        return after

    def go_on(self, step: int, config: Config) -> None:
        """A state of `step` was loaded."""
        self.rollback.go_on(step, config.rollback)
        if self.first_step is not None:
            self.first_step.go_on(step)

    def heed_flag(self) -> None:
        """Copy nothing any longer once a rank has said that it cannot."""
        if self.reader.flagged:
            self.rollback.give_up()

    def end_watch(self, state: State) -> State:
        """The state of a run that is not watched any longer."""
        self.reader.forget()
        self.rollback.free_newer()
        return replace(state, watched=False)

    def begin_again(self, config: Config, before: Config) -> None:
        """Forget the losses and the copies: a warm-up begins by `config`, after one by another."""
        self.judge.begin(config, before)
        self.reader.watch = LossWatch()
        self.reader.begin(config.warmup_origin, None)
        self.rollback.free()
        self.held_out.begin()


def rooms_of(config: Config, arguments: Mapping[str, Any]) -> Rooms:
    """The rooms of a new run with these arguments of the scheduler, checked and resolved."""
    ranks = Ranks(arguments["process_group"])
    log = EventLog(ranks)
    log.warn_of_a_short_run(config)
    judge = Judge(config, engine(arguments["gp"], config, arguments["seed"]), arguments["device"], ranks, log)
    live = LiveRun(arguments["optimizer"], arguments["model"])
    if live.is_of_another_model():
        cure = "pass the model that is trained, unless the optimizer has master copies of this one's"
        log.once("model", 0, f"model={type(live.model).__name__}: the optimizer has none of its parameters; {cure}")
    rollback = NoRollback(live, ranks, log)
    if config.rollback:
        rollback = Rollback(live, ranks, log, arguments["snapshot_device"], arguments["on_rollback"])
    first_step = FirstStep(config, arguments, rollback, ranks, log)
    return Rooms(ranks, log, judge, Reader(ranks), rollback, HeldOut(ranks), first_step=first_step)


class Stage:
    """A stage of a run: it takes the loss of a step and gives back the state of the run and the stage that is next.

    Attributes:
        busy_at: up to this step nothing is due, and a loss that may wait for the watch is only kept; 0 where that is not known.
    """

    def __init__(self, config: Config, rooms: Rooms) -> None:
        self.config, self.rooms, self.busy_at = config, rooms, 0

    def after_step(self, step: int, loss: float | Tensor, state: State) -> tuple[State, Stage]:
        """Take the loss of the `step`-th optimizer step."""
        raise NotImplementedError

    def after_skip(self, step: int, loss: float | Tensor, state: State, skipped: int) -> tuple[State, Stage]:
        """Take the loss of a step that the optimizer did not take, the `skipped`-th in a row, `step` having been taken."""
        raise NotImplementedError

    def watch_again(self, step: int, state: State) -> State:
        """The state of a run that was made longer at `step`; a warm-up goes on as it was."""
        return state

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept from step to step, unless a stage says so."""


def fold(losses: LossHistory, since: int, step: int) -> None:
    """Fold the losses now and then, for on a GPU it costs as much as twenty steps; all up to step `since` were read."""
    if since // FOLDED_EVERY < step // FOLDED_EVERY:
        losses.fold()
