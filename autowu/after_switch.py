"""State: the stage of a run in which the peak LR is held, then falls: what is heeded in a step, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from autowu.config import Config
from autowu.events import divergence_message, loss_changed_message, overfitting_message
from autowu.history import MISSING, LossHistory
from autowu.phases import (
    MAX_EXPLOSIONS,
    MAX_SETBACKS,
    LRRule,
    State,
    end_plateau_epoch,
    lowered,
    peak_lrs,
    phase_at,
    plateau_epoch_due,
    set_back,
    undo_set_backs,
)
from autowu.plateau import Plateau
from autowu.ramp import MOST_RAMPS
from autowu.second_look import SecondLook
from autowu.stages import FOLDED_EVERY, SKIPPED, Rooms, Stage, fold
from autowu.watch import BLOCK, IN_A_ROW

__all__ = ["AfterSwitch"]

_COPIES: Final = 200
"""Of a run after the switch, at most, however short its warm-up and the interval between tests: more would slow it down."""
_POINTS: Final = 1024
"""Points that the losses since the switch are kept as."""
_PROBATION: Final = 40
"""Steps after a divergence before the run is copied again: what comes apart once more is no better than the copy it began at."""
_AT_ONCE: Final = 20
"""Steps after going back within which a loss that is no longer finite may have another cause than the LR."""


class AfterSwitch(Stage):
    """The peak is held, then the LR decays; the watch sets a run back that diverges."""

    def __init__(self, config: Config, rooms: Rooms) -> None:
        super().__init__(config, rooms)
        self.second_look = SecondLook(rooms)
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
        before = state
        self._losses.append(loss)
        if step < self.busy_at and type(loss) is float:  # as a rule
            if (since := self.rooms.reader.follow(step, loss)) is None:
                return state, self
            return self._steered(step, before, self._watch(step, since, state)), self
        if state.ramp is not None:
            return self._steered(step, before, self.second_look.go_on(self.config, step, loss, state, self._losses)), self
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
        if skipped % SKIPPED or not state.watched or not self.rooms.ranks.alone:
            return state, self
        if math.isfinite(value := float(loss)) or value == MISSING:
            return state, self
        before, reader = state, self.rooms.reader
        if state.ramp is not None:
            return self._steered(step, before, self.second_look.end(step, state)), self
        reader.follow_skipped(value)
        if reader.watch.silent >= IN_A_ROW:
            state = self.rooms.end_watch(state) if self._bears_no_more(state) else self._set_back(step, state)
        return self._steered(step, before, state), self

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
            self.rooms.heed_flag()
        if reader.watch.changed:
            state = self._undo_set_backs(step, state)
        if self._bears_no_more(state):  # it only remains to be seen whether the last was one
            seen = not reader.watch.on_trial or self._watch_is_over(step, state)
            return self.rooms.end_watch(state) if seen else state
        watch = reader.watch
        if watch.diverged if state.setbacks < MAX_SETBACKS else watch.exploded or watch.silent >= IN_A_ROW:
            return self._set_back(step, state)
        if since // BLOCK < step // BLOCK and self._watch_is_over(step, state):
            return self.rooms.end_watch(state)
        on_probation = self._back_at is not None and step < self._back_at + _PROBATION
        if copy_is_due and reader.watch.near_best and not reader.watch.doubt and not on_probation:
            rollback.renew(step, reader.watch.level)
        may_ramp = since // BLOCK < step // BLOCK and step < self.config.cooldown_from and state.ramps < MOST_RAMPS
        return self.second_look.begin(self.config, step, state, self._losses) if may_ramp else state

    def _read(self, step: int, loss: float | Tensor) -> int | None:
        """Have the watch follow the loss; the step of the look before, None where it has not followed any."""
        reader, rollback = self.rooms.reader, self.rooms.rollback
        if reader.follows_at_once(loss, self._losses):
            fold(self._losses, step - 1, step)
            interval = self._copies_every(step)
            if self.config.decay_phase_stat is None and self.config.cooldown != "auto":
                left = min(BLOCK - step % BLOCK, interval - step % interval, FOLDED_EVERY - step % FOLDED_EVERY)
                self.busy_at = step + left
            look = step % BLOCK == 0 or (rollback.able and step % interval == 0)
            return reader.follow(step, loss, look=look)
        since = reader.read_block(step, self._losses, flag=rollback.failed)
        if since is not None:
            fold(self._losses, since, step)
            self.rooms.heed_flag()
        return since

    def _set_back(self, step: int, state: State) -> State:
        """Go back to the last good copy, with a lower peak."""
        restored = self.rooms.rollback.put_back(step)
        if restored is None and self.rooms.rollback.lost(step):
            return self.rooms.end_watch(state)
        self.rooms.held_out.leave()
        at_once = self.rooms.reader.watch.silent >= IN_A_ROW and self._back_at is not None and step - self._back_at <= _AT_ONCE
        state, self._back_at = set_back(state), None if restored is None else step
        self.rooms.reader.go_back(None if restored is None else restored.level)
        message = divergence_message(state, None if restored is None else restored.step, at_once=at_once)
        self.rooms.log.warn("divergence", step, message)
        over = self._bears_no_more(state) and not self.rooms.reader.watch.on_trial
        return self.rooms.end_watch(state) if over else state

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
            self.rooms.heed_flag()
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
        assert state.switch is not None
        warmup = state.switch.step - self.config.warmup_origin
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
