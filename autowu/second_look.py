"""State: ramps in a run, from the copy that each begins with to the one that is put back, see :mod:`autowu.ramp`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autowu.config import Config
from autowu.events import ramp_message
from autowu.history import LossHistory
from autowu.phases import RampPlan, State, phase_at
from autowu.ramp import MOST_RAMPS, NEIGHBOURS, Ramp, is_smooth, next_ramp
from autowu.stages import Rooms, fold

__all__ = ["SecondLook"]


class SecondLook:
    """Looks at the peak LR again, after the switch, as long as it may be too low. The losses of a ramp are none of the watch's."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms

    def begin(self, config: Config, step: int, state: State, losses: LossHistory) -> State:
        """Begin a ramp after `step` steps, where one is due and the run, with these `losses`, is well."""
        rooms, plan = self.rooms, next_ramp(config, state, step)
        watch = rooms.reader.watch
        if plan is None or not rooms.rollback.able or rooms.held_out.came or not watch.near_best:
            return state
        if self._ramp(plan).is_blind(watch.progress, state.ramps):
            return state
        last = None if state.ramps else losses.last(NEIGHBOURS)  # later, those of a ramp may be among them
        if last is not None and len(last) < min(NEIGHBOURS, losses.steps):  # the others have just been merged
            return state
        rooms.reader.catch_up()
        rooms.heed_flag()
        if not watch.near_best or watch.on_trial or watch.noise == 0:
            return state
        if last is not None and not rooms.ranks.all_agree(torch.tensor([float(not is_smooth(last))], dtype=torch.float64)):
            rooms.log.tell("ramp", step, "AutoWU, no second look at the peak LR: the losses are smooth, as those of a running mean")
            return replace(state, ramps=MOST_RAMPS)
        rooms.rollback.renew(step, watch.level)
        if not rooms.rollback.is_held(step):
            return replace(state, ramps=MOST_RAMPS)
        careful = not rooms.rollback.is_whole()  # what no copy holds is to see little of LRs too high
        rooms.reader.begin_ramp(self._ramp(plan, careful=careful))
        return replace(state, ramp=plan, ramps=state.ramps + 1)

    def _ramp(self, plan: RampPlan, *, careful: bool = False) -> Ramp:
        watch = self.rooms.reader.watch
        return Ramp(plan.steps, plan.span, watch.mean, watch.noise, careful=careful)

    def go_on(self, config: Config, step: int, loss: float | Tensor, state: State, losses: LossHistory) -> State:
        """Take the loss of a step of the ramp, the last of `losses`."""
        rooms, plan = self.rooms, state.ramp
        assert plan is not None
        # A branch that is forked where its cooldown begins has that in its plan one step later than a full run.
        is_last = step >= plan.begin + plan.steps or phase_at(config, state, step - 1) != "stable"
        is_last = is_last or (rooms.ranks.alone and rooms.rollback.held is None)
        if rooms.reader.follows_at_once(loss, losses):
            rooms.reader.follow(step, loss, look=True)
            fold(losses, step - 1, step)
        else:
            ends_part = rooms.reader.ramp is not None and (step - plan.begin) % rooms.reader.ramp.part == 0
            since = rooms.reader.read_block(step, losses, flag=rooms.rollback.failed, due=is_last or ends_part)
            if since is not None:
                fold(losses, since, step)
            if ends_part:  # a block is read when the next is full, which at such LRs is late: a dozen times a ramp it is waited for
                rooms.reader.catch_up()
        if rooms.held_out.came:
            rooms.held_out.read()  # which tells of weights that are not to stay
        ramp = rooms.reader.ramp
        return self.end(step, state) if is_last or ramp is None or ramp.edge is not None else state

    def end(self, step: int, state: State) -> State:
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
        return rooms.end_watch(after) if rooms.rollback.lost(step) else after
