"""State: the stage of a run in which the LR grows: losses, tests and copies, and which way it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import Tensor

from autowu.after_switch import AfterSwitch
from autowu.config import Config
from autowu.events import doubt_message, not_finite_message, switch_message
from autowu.history import MISSING
from autowu.phases import (
    LRs,
    State,
    Switch,
    Verdict,
    after_test,
    common_lr,
    copy_share,
    exploded,
    falls,
    is_test_due,
    next_test,
    switched,
    warmup_lr_at,
)
from autowu.plateau import start_of
from autowu.rollback import Restored
from autowu.stages import SKIPPED, Rooms, Stage
from autowu.switching import MIN_LOSSES
from autowu.watch import IN_A_ROW

__all__ = ["WarmUp", "stage_of"]

_SPACING: Final = 2.0
"""On `peak_factor`, the share of the LR between two copies of a warm-up: so far past the minimum the edge lies in the mean."""
_PROBATION: Final = 40
"""Steps after going back for losses that were not finite within which such losses end the warm-up."""


class WarmUp(Stage):
    """The LR grows; tests ask whether the minimum is past; copies are taken as long as the loss falls.

    Args:
        fallback_lr: the LR to go on with if no test ever had a fit, of several optimizers one each.
    """

    def __init__(self, config: Config, rooms: Rooms, fallback_lr: LRs) -> None:
        super().__init__(config, rooms)
        self.fallback_lr = fallback_lr

    def after_step(self, step: int, loss: float | Tensor, state: State) -> tuple[State, Stage]:
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
        rooms, reader, history = self.rooms, self.rooms.reader, self.rooms.judge.history
        if reader.follows_at_once(loss, history):
            self.busy_at = next_test(self.config, step)
            return reader.follow(step, loss, look=due)
        since = reader.read_block(step, history, flag=rooms.rollback.failed, due=due)
        rooms.heed_flag()
        return since

    def after_skip(self, step: int, loss: float | Tensor, state: State, skipped: int) -> tuple[State, Stage]:
        """Nothing mends a run whose steps are skipped again and again and whose loss is not finite."""
        if skipped % SKIPPED or not self.config.watch or not self.rooms.ranks.alone:
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
        return state if self.config.watch and state.watched else rooms.end_watch(state), AfterSwitch(self.config, rooms)


def stage_of(config: Config, state: State, rooms: Rooms, fallback_lr: LRs) -> Stage:
    """The stage of a run in `state`."""
    return WarmUp(config, rooms, fallback_lr) if state.switch is None else AfterSwitch(config, rooms)


def _switch(state: State) -> Switch:
    assert state.switch is not None
    return state.switch
