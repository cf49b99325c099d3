"""State: the two stages of a run. Each takes the loss of a step and gives back the state of the run and the stage that is next.

This is where it is decided in which order things happen in a step: the loss is kept, the watch reads it, a test is made where one
is due, and the run goes back to a copy where it must.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from autowu.config import Config, described
from autowu.events import (
    EventLog,
    divergence_message,
    doubt_message,
    loss_changed_message,
    not_finite_message,
    overfitting_message,
    ramp_message,
    switch_message,
)
from autowu.held_out import HeldOut
from autowu.history import MISSING, LossHistory
from autowu.judge import Judge, engine
from autowu.live import LiveRun
from autowu.phases import (
    MAX_EXPLOSIONS,
    MAX_SETBACKS,
    LRRule,
    LRs,
    State,
    Switch,
    Verdict,
    after_test,
    common_lr,
    copy_share,
    end_plateau_epoch,
    exploded,
    falls,
    is_test_due,
    lowered,
    next_test,
    peak_lrs,
    phase_at,
    plateau_epoch_due,
    set_back,
    switched,
    undo_set_backs,
    warmup_lr_at,
)
from autowu.plateau import Plateau, start_of
from autowu.ramp import MOST_RAMPS, Ramp, is_smooth, next_ramp
from autowu.ranks import Ranks
from autowu.reader import Reader
from autowu.record import Record
from autowu.rollback import NoRollback, Restored, Rollback
from autowu.switching import MIN_LOSSES
from autowu.watch import BLOCK, IN_A_ROW, LossWatch

__all__ = ["AfterSwitch", "Rooms", "Stage", "WarmUp", "rooms_of", "stage_of"]

_COPIES: Final = 200
"""Of a run after the switch, at most, however short its warm-up and the interval between tests: more would slow it down."""
_POINTS: Final = 1024
"""Points that the losses since the switch are kept as."""
_FOLDED_EVERY: Final = 512
"""Steps: what is staged must outlast a block, should it be read in blocks from now on."""
_SPACING: Final = 2.0
"""On `peak_factor`, the share of the LR between two copies of a warm-up: so far past the minimum the edge lies in the mean."""
_PROBATION: Final = 40
"""Steps after a divergence before the run is copied again: what comes apart once more is no better than the copy it began at."""
_AT_ONCE: Final = 20
"""Steps after going back within which a loss that is no longer finite may have another cause than the LR."""
_SKIPPED: Final = 20
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
        self.ranks.compare(described(config) | own)

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
    rollback = NoRollback(live, ranks, log)
    if config.rollback:
        rollback = Rollback(live, ranks, log, arguments["snapshot_device"], arguments["on_rollback"])
    return Rooms(ranks, log, judge, Reader(ranks), rollback, HeldOut(ranks))


class WarmUp:
    """The LR grows; tests ask whether the minimum is past; copies are taken as long as the loss falls.

    Args:
        fallback_lr: the LR to go on with if no test ever had a fit, of several optimizers one each.

    Attributes:
        busy_at: up to this step nothing is due, and a loss that may wait for the watch is only kept; 0 where that is not known.
    """

    def __init__(self, config: Config, rooms: Rooms, fallback_lr: LRs) -> None:
        self.config, self.rooms, self.fallback_lr = config, rooms, fallback_lr
        self.busy_at = 0

    def after_step(self, step: int, loss: float | Tensor, state: State) -> tuple[State, Stage]:
        """Take the loss of the `step`-th optimizer step."""
        rooms = self.rooms
        if step < self.busy_at and type(loss) is float:  # as a rule
            rooms.judge.history.append(loss)
            came_apart = rooms.reader.follow(step, loss) is not None and self._is_apart()
            return self._explode(step, state) if came_apart else (state, self)
        due, self.busy_at = is_test_due(self.config, state, step), 0
        rooms.judge.history.append(loss)
        if rooms.held_out.came:
            rooms.held_out.begin_at(rooms.held_out.read())
        if self.config.watch and self._read(step, loss, due) is not None and self._is_apart():
            state, stage = self._explode(step, state)
            if stage is not self:
                return state, stage
        return self._test(step, state) if due else (state, self)

    def _is_apart(self) -> bool:
        """Whether the run has come apart, by a look at the watch."""
        watch = self.rooms.reader.watch
        return watch.exploded or watch.apart >= IN_A_ROW

    def _read(self, step: int, loss: float | Tensor, due: bool) -> int | None:
        """Have the watch follow the loss; None where it has not followed any."""
        reader, history, rollback = self.rooms.reader, self.rooms.judge.history, self.rooms.rollback
        if reader.follows_at_once(loss, history):
            self.busy_at = next_test(self.config, step)
            return reader.follow(step, loss, look=due)
        since = reader.read_block(step, history, flag=rollback.failed, due=due)
        if reader.flagged:
            rollback.give_up()
        return since

    def after_skip(self, step: int, loss: float | Tensor, state: State, skipped: int) -> tuple[State, Stage]:
        """Take the loss of a step that the optimizer did not take, the `skipped`-th in a row, `step` having been taken.

        Nothing mends a run whose steps are skipped again and again and whose loss is not finite.
        """
        if skipped % _SKIPPED or not self.config.watch or not self.rooms.ranks.alone:
            return state, self
        self.rooms.reader.follow_skipped(float(loss))
        return self._explode(step, state) if self.rooms.reader.watch.exploded else (state, self)

    def _test(self, step: int, state: State) -> tuple[State, Stage]:
        """The test that is due."""
        position = step - self.config.warmup_origin
        at_limit = position == self.config.warmup_limit
        if position < MIN_LOSSES and not at_limit:
            self._copy_before_the_first_fit(step)
            return state, self
        found, all_sound = self._verdict(step, state)
        after = after_test(self.config, state, step, found)
        if after.switch is not None:
            return self._leave(after, "", self._go_back_if_past(step, after.switch))
        if at_limit:
            after = self._ended(step, state, found)
            return self._leave(after, " (warm-up at its limit)", self._go_back_if_past(step, _switch(after)))
        self.rooms.judge.prepare(self.config, after, step)
        nothing_known = self.rooms.judge.last is None or (self.rooms.rollback.able and self.rooms.rollback.held is None)
        if all_sound and (nothing_known or falls(found)):
            self.rooms.reader.catch_up()  # the test has waited for the device
            self._copy(step, worth=nothing_known or self.rooms.reader.watch.at_best)
        return after, self

    def _verdict(self, step: int, state: State) -> tuple[Verdict | None, bool]:
        """The verdict of a test, None for none, and whether all that would be copied is finite on all ranks."""
        rollback = self.rooms.rollback
        sound = rollback.sound(step)
        found, heard = self.rooms.judge.test(self.config, state, step, sound=sound, flag=rollback.failed)
        if heard.flagged:
            rollback.give_up()
        if found is not None:
            self.rooms.record.test(step, found)
        return found, heard.sound

    def _copy_before_the_first_fit(self, step: int) -> None:
        """In a warm-up of a dozen steps the minimum may be past by the first fit. Ranks have nothing to agree by before it."""
        history = self.rooms.judge.history
        sound = self.rooms.rollback.sound(step) if self.rooms.ranks.alone else None
        if sound is not None and bool(sound) and bool(MISSING < history.staged[-1] <= history.mean()):
            self._copy(step)

    def _copy(self, step: int, *, worth: bool = True) -> None:
        """Copy the run where that is due and `worth` it: a loss that has leapt up and falls again has not come back yet."""
        level = self.rooms.reader.watch.level
        lr, spacing = warmup_lr_at(self.config, step - self.config.warmup_origin), copy_share(self.config)
        if self.config.min_rise:  # else the peak follows from the minimum
            spacing = min(1.0, _SPACING * spacing)
        rollback = self.rooms.rollback
        (rollback.take if worth else rollback.pass_by)(step, lr, level, spacing)

    def _explode(self, step: int, state: State) -> tuple[State, Stage]:
        """A loss that explodes ends the warm-up at once, unless that may have been one batch."""
        if self._came_out_of_the_blue(step) and (restored := self.rooms.rollback.put_back(step)) is not None:
            self.rooms.reader.begin(step, restored.level)
            self.rooms.log.warn("not_finite", step, not_finite_message(restored.step))
            return replace(state, votes=0), self
        self.rooms.log.warn("explosion", step, "the loss has exploded, which ends the warm-up")
        found, _ = self._verdict(step, state)
        after = exploded(self.config, self._ended(step, state, found), self.rooms.judge.before)
        restored = self._go_back(step, _switch(after))
        if restored is None and self.rooms.rollback.lost(step):
            after = replace(after, watched=False)
        return self._leave(after, "", restored)

    def _came_out_of_the_blue(self, step: int) -> bool:
        """Whether losses that are not finite follow on a loss that fell, and no others did so a moment ago: an LR comes back."""
        watch, last = self.rooms.reader.watch, self.rooms.judge.last
        if any(event.kind == "not_finite" and step - event.step <= _PROBATION for event in self.rooms.log.events):
            return False
        fell = watch.high == watch.above == 0 and watch.at_best and (last is None or falls(last))
        return fell and watch.silent >= IN_A_ROW

    def _ended(self, step: int, state: State, found: Verdict | None) -> State:
        """The state after a warm-up that ends whatever the last test found."""
        judge = self.rooms.judge
        # Of several ranks a verdict is a test late, and there is no next one.
        if found is None and judge.last is None and not self.rooms.ranks.alone:
            judge.prepare(self.config, state, step)
            found, _ = self._verdict(step, state)
        return switched(self.config, state, step, found or judge.last, self.fallback_lr)

    def _go_back(self, step: int, switch: Switch) -> Restored | None:
        """Undo the steps at too high an LR."""
        self.rooms.rollback.keep_one(common_lr(self.config, switch))
        return self.rooms.rollback.put_back(step)

    def _go_back_if_past(self, step: int, switch: Switch) -> Restored | None:
        """The same, unless the loss still falls, and not for a second time."""
        last, reader = self.rooms.judge.last, self.rooms.reader
        reader.catch_up()
        if last is not None and not (falls(last) and reader.watch.at_best):
            return self._go_back(step, switch)
        self.rooms.rollback.keep_one()
        return None

    def _leave(self, state: State, ended_by: str, restored: Restored | None) -> tuple[State, Stage]:
        """On to the next stage, the run being in `state` and, where a copy was put back, there."""
        switch, rooms = _switch(state), self.rooms
        rooms.held_out.begin()
        rooms.reader.begin(switch.step, None if restored is None else restored.level)
        rooms.reader.watch.slack = 0.0  # what leapt up and back did so at other LRs
        if self.config.cooldown == "auto" and state.start_loss is None:
            state = replace(state, start_loss=start_of(rooms.judge.history))
        message = switch_message(self.config, switch, ended_by, None if restored is None else restored.step)
        rooms.log.tell("switch", switch.step, message)
        if doubt := doubt_message(self.config, switch):
            rooms.log.warn("peak", switch.step, doubt)
        after = AfterSwitch(self.config, rooms)
        return state if self.config.watch and state.watched else after.end_watch(state), after

    def watch_again(self, step: int, state: State) -> State:
        """The warm-up of a run that was made longer goes on as it was."""
        return state

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept from step to step."""


class AfterSwitch:
    """The peak is held, then the LR decays; the watch sets a run back that diverges."""

    def __init__(self, config: Config, rooms: Rooms) -> None:
        self.config, self.rooms = config, rooms
        self.busy_at = 0  # as of WarmUp
        self._losses = LossHistory(_POINTS)  # those since the switch; staged are those since the last look, at least
        self._epoch: LossHistory | None = None  # those of the epoch, for the plateau rule
        self._back_at: int | None = None  # the step of the last divergence, if a copy was put back
        self._lost = False  # whether a run that is no longer watched was found to have weights that are not finite
        self._rule: LRRule | None = None  # of the LRs by the present state
        self._plateau: Plateau | None = None  # those at the present peak LR, for a cooldown that begins by itself

    def _copies_every(self, step: int) -> int:
        """Steps between two copies; of a run whose end is open as of one that ended here."""
        every, least = (self.config.total_steps or step) // _COPIES, self.config.test_interval
        return every if every > least else least

    def after_step(self, step: int, loss: float | Tensor, state: State) -> tuple[State, Stage]:
        """Take the loss of the `step`-th optimizer step."""
        before = state
        self._losses.append(loss)
        if step < self.busy_at and type(loss) is float:  # as a rule
            if (since := self.rooms.reader.follow(step, loss)) is None:
                return state, self
            return self._steered(step, before, self._watch(step, since, state)), self
        if state.ramp is not None:
            return self._steered(step, before, self._go_on_with_ramp(step, loss, state)), self
        ruled, self.busy_at = self.config.decay_phase_stat is not None, 0
        if ruled and self._is_ruled(state, step - 1):
            if self._epoch is None:
                self._epoch = LossHistory()
            self._epoch.append(loss)
        if state.watched and (since := self._read(step, loss)) is not None:
            state = self._watch(step, since, state)
        elif not (state.watched or self._lost) and self.config.watch and self._is_look_due(step):
            self._lost = self.rooms.rollback.lost_here(step)
        if self.rooms.held_out.came:
            state = self._heed_held_out(step, state)
        if ruled and plateau_epoch_due(self.config, state, step):
            state = self._end_epoch(state)
        if self.config.cooldown == "auto":
            state = self._look_for_a_plateau(step, loss, state)
        return self._steered(step, before, state), self

    def _steered(self, step: int, before: State, state: State) -> State:
        """The state, put on record where it is not what it was."""
        if state is not before:
            self.busy_at = 0
            self.rooms.record.steer(step, self.config, before, self.config, state)
        return state

    def _is_look_due(self, step: int) -> bool:
        """Whether weights are looked at that nothing mends any longer, so that it is said if they are lost."""
        return step % self._copies_every(step) == 0 or step == self.config.total_steps

    def after_skip(self, step: int, loss: float | Tensor, state: State, skipped: int) -> tuple[State, Stage]:
        """A step that the optimizer did not take changes nothing here, unless the loss is not finite, again and again."""
        if skipped % _SKIPPED or not state.watched or not self.rooms.ranks.alone:
            return state, self
        if math.isfinite(value := float(loss)) or value == MISSING:
            return state, self
        before, reader = state, self.rooms.reader
        if state.ramp is not None:
            return self._steered(step, before, self.end_ramp(step, state)), self
        reader.follow_skipped(value)
        if reader.watch.silent >= IN_A_ROW:
            state = self.end_watch(state) if self._bears_no_more(state) else self._set_back(step, state)
        return self._steered(step, before, state), self

    def end_watch(self, state: State) -> State:
        """The state of a run that is not watched any longer."""
        self.rooms.reader.forget()
        self.rooms.rollback.free_newer()
        return replace(state, watched=False)

    def watch_again(self, step: int, state: State) -> State:
        """The state of a run that was made longer at `step`: it is watched again where its LR had come down too low for that."""
        if state.watched or not self.config.watch or self._bears_no_more(state):
            return state
        self.rooms.reader.begin(step, None)
        return replace(state, watched=True)

    def _is_ruled(self, state: State, step: int) -> bool:
        """Whether the plateau rule wants the loss of optimizer step `step`, from 0."""
        return self.config.decay_phase_stat is not None and phase_at(self.config, state, step) == "stable"

    def _watch(self, step: int, since: int, state: State) -> State:
        """Heed what the watch says, after a look at it; the one before was at step `since`."""
        reader, rollback, interval = self.rooms.reader, self.rooms.rollback, self._copies_every(step)
        copy_is_due = rollback.able and since // interval < step // interval
        if copy_is_due:  # which waits for the device anyway
            reader.catch_up()
            self._heed_flag()
        if reader.watch.changed:
            state = self._undo_set_backs(step, state)
        if self._bears_no_more(state):  # it only remains to be seen whether the last was one
            seen = not reader.watch.on_trial or self._watch_is_over(step, state)
            return self.end_watch(state) if seen else state
        watch = reader.watch
        if watch.diverged if state.setbacks < MAX_SETBACKS else watch.exploded or watch.silent >= IN_A_ROW:
            return self._set_back(step, state)
        if since // BLOCK < step // BLOCK and self._watch_is_over(step, state):
            return self.end_watch(state)
        on_probation = self._back_at is not None and step < self._back_at + _PROBATION
        if copy_is_due and reader.watch.near_best and not reader.watch.doubt and not on_probation:
            rollback.renew(step, reader.watch.level)
        may_ramp = since // BLOCK < step // BLOCK and step < self.config.cooldown_from and state.ramps < MOST_RAMPS
        return self._begin_ramp(step, state) if may_ramp else state

    def _begin_ramp(self, step: int, state: State) -> State:
        """Look at the peak LR again, from a copy, where that is due and the run is well."""
        rooms, plan = self.rooms, next_ramp(self.config, state, step)
        watch = rooms.reader.watch
        if plan is None or not rooms.rollback.able or rooms.held_out.came or not watch.near_best:
            return state
        if Ramp(plan.steps, plan.span, watch.mean, watch.noise).is_blind(watch.progress, state.ramps):
            return state
        rooms.reader.catch_up()
        self._heed_flag()
        if not watch.near_best or watch.on_trial or watch.noise == 0:
            return state
        if not rooms.ranks.all_agree(torch.tensor([float(not is_smooth(self._losses.staged))], dtype=torch.float64)):
            rooms.log.tell("ramp", step, "AutoWU, no second look at the peak LR: the losses are smooth, as those of a running mean")
            return replace(state, ramps=MOST_RAMPS)
        rooms.rollback.renew(step, watch.level)
        if not rooms.rollback.is_held(step):
            return replace(state, ramps=MOST_RAMPS)
        careful = not rooms.rollback.is_whole()  # what no copy holds is to see little of LRs too high
        rooms.reader.begin_ramp(Ramp(plan.steps, plan.span, watch.mean, watch.noise, careful=careful))
        return replace(state, ramp=plan, ramps=state.ramps + 1)

    def _go_on_with_ramp(self, step: int, loss: float | Tensor, state: State) -> State:
        """The losses at LRs above the peak are no business of the watch."""
        rooms, plan = self.rooms, state.ramp
        assert plan is not None
        # A branch that is forked where its cooldown begins has that in its plan one step later than a full run.
        is_last = step >= plan.begin + plan.steps or phase_at(self.config, state, step - 1) != "stable"
        is_last = is_last or (rooms.ranks.alone and rooms.rollback.held is None)
        if rooms.reader.follows_at_once(loss, self._losses):
            rooms.reader.follow(step, loss, look=True)
            if step % _FOLDED_EVERY == 0:
                self._losses.fold()
        else:
            ends_part = rooms.reader.ramp is not None and (step - plan.begin) % rooms.reader.ramp.part == 0
            since = rooms.reader.read_block(step, self._losses, flag=rooms.rollback.failed, due=is_last or ends_part)
            if since is not None:
                self._fold_read(step, since)
            if ends_part:  # a block is read when the next is full, which at such LRs is late: a dozen times a ramp it is waited for
                rooms.reader.catch_up()
        if rooms.held_out.came:
            rooms.held_out.read()  # which tells of weights that are not to stay
        ramp = rooms.reader.ramp
        return self.end_ramp(step, state) if is_last or ramp is None or ramp.edge is not None else state

    def end_ramp(self, step: int, state: State) -> State:
        """Go back to where the ramp began, with a higher peak if the loss took far more than the peak LR to rise."""
        rooms = self.rooms
        rooms.reader.catch_up()
        ramp, restored = rooms.reader.ramp, rooms.rollback.put_back(step)
        rooms.reader.end_ramp(step)
        edge, risen, factor = (None, False, 1.0) if ramp is None else (ramp.edge, ramp.risen, ramp.factor)
        if restored is None:  # it may not bear what it has been through
            factor = 1.0
        is_right = factor == 1 and edge is not None
        after = replace(state, ramp=None, raised=state.raised * factor, ramps=MOST_RAMPS if is_right else state.ramps)
        back_at = None if restored is None else restored.step
        rooms.log.tell("ramp", step, ramp_message(after, edge, risen, factor, back_at))
        if ramp is not None and ramp.careful and ramp.burst:
            text = "losses of a ramp were not finite: statistics of the model may not be, either, which no copy has without model="
            rooms.log.warn_once("snapshot", step, text)
        if restored is not None:
            return after
        rooms.log.warn_once("snapshot", step, "the copy of before a ramp is not there: the weights stay those of its high LRs")
        return self.end_watch(after) if rooms.rollback.lost(step) else after

    def _read(self, step: int, loss: float | Tensor) -> int | None:
        """Have the watch follow the loss; the step of the look before, None where it has not followed any."""
        reader, rollback = self.rooms.reader, self.rooms.rollback
        if reader.follows_at_once(loss, self._losses):
            if step % _FOLDED_EVERY == 0:
                self._losses.fold()
            interval = self._copies_every(step)
            if self.config.decay_phase_stat is None and self.config.cooldown != "auto":
                left = min(BLOCK - step % BLOCK, interval - step % interval, _FOLDED_EVERY - step % _FOLDED_EVERY)
                self.busy_at = step + left
            look = step % BLOCK == 0 or (rollback.able and step % interval == 0)
            return reader.follow(step, loss, look=look)
        since = reader.read_block(step, self._losses, flag=rollback.failed)
        if since is not None:
            self._fold_read(step, since)
            self._heed_flag()
        return since

    def _fold_read(self, step: int, since: int) -> None:
        """Fold the losses now and then, for on a GPU it costs as much as twenty steps; those that were read can go."""
        if since // _FOLDED_EVERY < step // _FOLDED_EVERY:
            self._losses.fold()

    def _heed_flag(self) -> None:
        if self.rooms.reader.flagged:
            self.rooms.rollback.give_up()

    def _set_back(self, step: int, state: State) -> State:
        """Go back to the last good copy, with a lower peak."""
        restored = self.rooms.rollback.put_back(step)
        if restored is None and self.rooms.rollback.lost(step):
            return self.end_watch(state)
        self.rooms.held_out.leave()
        at_once = self.rooms.reader.watch.silent >= IN_A_ROW and self._back_at is not None and step - self._back_at <= _AT_ONCE
        state, self._back_at = set_back(state), None if restored is None else step
        self.rooms.reader.go_back(None if restored is None else restored.level)
        message = divergence_message(state, None if restored is None else restored.step, at_once=at_once)
        self.rooms.log.warn("divergence", step, message)
        over = self._bears_no_more(state) and not self.rooms.reader.watch.on_trial
        return self.end_watch(state) if over else state

    def _watch_is_over(self, step: int, state: State) -> bool:
        """Whether nothing will diverge any longer, at LRs as low as that of optimizer step `step`."""
        if self._rule is None or self._rule.state is not state or self._rule.config is not self.config:
            self._rule = LRRule(self.config, state)
        return self._rule.is_low(step)

    def _bears_no_more(self, state: State) -> bool:
        """Whether nothing sets the run back any longer, by what all ranks know alike."""
        return state.setbacks >= (MAX_SETBACKS if self._back_at is None else MAX_EXPLOSIONS)

    def _undo_set_backs(self, step: int, state: State) -> State:
        """The loss is high on the weights of the copy, or at a lower LR, too: it has changed, and the peak was not too high."""
        watch = self.rooms.reader.watch
        state = undo_set_backs(state, watch.halved)
        if self._back_at is not None:  # it was the loss: the run may be copied
            self._back_at = max(0, step - _PROBATION)
        watch.changed = False
        back = watch.level < watch.returned + watch.rise / 2  # it has leapt up and back
        risen = watch.rise if back or self.rooms.rollback.held is None else None
        self.rooms.log.warn("loss_changed", step, loss_changed_message(state, watch.level, watch.returned, risen))
        return state

    def _heed_held_out(self, step: int, state: State) -> State:
        """Keep the weights that are best by the held-out losses; go back to them, with a lower peak, where the run is past them."""
        rooms, held_out = self.rooms, self.rooms.held_out
        if state.watched:
            rooms.reader.catch_up()
            self._heed_flag()
        loss = held_out.read()
        if math.isnan(loss):
            rooms.log.warn_once("held_out", step, "a held-out loss was not finite; it is left out")
        elif held_out.follow(loss):
            rooms.rollback.keep_best(step, rooms.reader.watch.level)
        elif held_out.is_past_best:
            found = held_out.level, held_out.best
            restored = rooms.rollback.put_back_best(step)
            held_out.go_on(restored=restored is not None)
            state = lowered(state)
            if not state.watched:
                rooms.rollback.free_newer()
            elif restored is not None:
                rooms.reader.begin(step, restored.level)
            rooms.log.warn("overfitting", step, overfitting_message(state, *found, None if restored is None else restored.step))
        return state

    def _look_for_a_plateau(self, step: int, loss: float | Tensor, state: State) -> State:
        """The state of a run whose loss may have stopped improving by `step`."""
        if state.settled or phase_at(self.config, state, step - 1) != "stable":
            return state
        peak, *_ = peak_lrs(replace(state, batch_factor=1.0))  # at which a batch of another size goes on
        if self._plateau is None or self._plateau.peak != peak:  # at another LR the loss falls, or rises, anew
            self._plateau = Plateau(self.rooms.ranks, peak)
        self._plateau.append(loss)
        warmup = _switch(state).step - self.config.warmup_origin
        if not self._plateau.is_due(warmup):
            return state
        return replace(state, settled=self._plateau.settled(warmup, state.start_loss, self.config.confidence))

    def _end_epoch(self, state: State) -> State:
        loss_sum, count = self.rooms.ranks.sum((self._epoch or LossHistory()).total()).tolist()
        self._epoch = None
        return end_plateau_epoch(self.config, state, loss_sum / count if count else math.nan)

    def state_dict(self) -> dict[str, Any]:
        epoch = None if self._epoch is None else self._epoch.state_dict()
        plateau = {} if self._plateau is None else {"plateau": self._plateau.state_dict()}
        back = {} if self._back_at is None else {"back_at": self._back_at}
        return {"losses": self._losses.state_dict(), "epoch": epoch, **plateau, **back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, saved = LossHistory(_POINTS), LossHistory.from_state_dict(state["losses"])
        if saved.max_points == _POINTS:
            self._losses = saved
        else:  # of version 5, which kept no more than what the watch was still to read
            for loss in saved.staged.tolist():
                self._losses.append(loss)
        self._epoch = None if state["epoch"] is None else LossHistory.from_state_dict(state["epoch"])
        self._plateau, self._back_at = None, state.get("back_at")
        if (plateau := state.get("plateau")) is not None:
            self._plateau = Plateau(self.rooms.ranks, plateau["peak"])
            self._plateau.load_state_dict(plateau)


Stage: TypeAlias = "WarmUp | AfterSwitch"


def stage_of(config: Config, state: State, rooms: Rooms, fallback_lr: LRs) -> Stage:
    """The stage of a run in `state`."""
    return WarmUp(config, rooms, fallback_lr) if state.switch is None else AfterSwitch(config, rooms)


def _switch(state: State) -> Switch:
    assert state.switch is not None
    return state.switch
