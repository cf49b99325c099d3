"""State: what befell a run, and who is told of it in which words."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autowu.config import MAX_WARMUP_FRACTION, Config
from autowu.phases import (
    MAX_EXPLOSIONS,
    MAX_SETBACKS,
    Event,
    State,
    Switch,
    all_lrs,
    each_config,
    each_lr,
    first_switch,
    most_setbacks,
    peak_lrs,
    phase_at,
)
from autowu.ranks import Ranks

__all__ = [
    *("EventLog", "back_at", "divergence_message", "doubt_message", "in_words", "loss_changed_message"),
    *("end_message", "not_finite_message", "overfitting_message", "ramp_message", "range_message", "resume_message"),
    "switch_message",
]

_logger = logging.getLogger("autowu")


class EventLog:
    """The events of a run in order. All are kept; the logger ``autowu`` is told by the ranks that they concern."""

    def __init__(self, ranks: Ranks) -> None:
        self.events: list[Event] = []
        self._ranks = ranks

    def once(self, kind: str, step: int, message: str) -> None:
        """A trouble of this rank: warned of once a run and kind."""
        if all(event.kind != kind for event in self.events):
            self.events.append(Event(kind, step, message))
            _logger.warning("AutoWU, step %d: %s", step, message)

    def warn_of_a_short_run(self, config: Config) -> None:
        """Say where the warm-up has too few losses for a verdict before its second half; no event, since nothing befell the run."""
        if 2 * (needed := first_switch(config, alone=self._ranks.alone)) > config.warmup_limit and self._ranks.is_first:
            few = f"a warm-up of {config.warmup_limit} steps is too short to find an LR by"
            if config.total_steps is None:
                _logger.warning("AutoWU: %s; pass max_warmup_steps=%d or more", few, 2 * needed)
                return
            share = config.warmup_limit / config.total_steps
            if config.warmup_limit == max(1, int(MAX_WARMUP_FRACTION * config.total_steps)):  # which is rounded
                share = MAX_WARMUP_FRACTION
            least = math.ceil(2 * needed / share)
            cure = f"train for {least} steps or more, in place of {config.total_steps}, or use another schedule"
            _logger.warning("AutoWU: %s; %s", few, cure)

    def warn_once(self, kind: str, step: int, message: str) -> None:
        """A trouble of all ranks alike: the first warns of it, once a run and kind."""
        if all(event.kind != kind for event in self.events):
            self.warn(kind, step, message)

    def warn(self, kind: str, step: int, message: str) -> None:
        """What went wrong on all ranks alike: the first warns."""
        self.events.append(Event(kind, step, message))
        if self._ranks.is_first:
            _logger.warning("AutoWU, step %d: %s", step, message)

    def fail(self, kind: str, step: int, message: str) -> None:
        """What ends a run's hope, on all ranks alike: the first says it as an error, once a run and kind."""
        if any(event.kind == kind for event in self.events):
            return
        self.events.append(Event(kind, step, message))
        if self._ranks.is_first:
            _logger.error("AutoWU, step %d: %s", step, message)

    def tell(self, kind: str, step: int, message: str) -> None:
        """What is as it should be, on all ranks alike: the first says it, also to those who have set up no logging."""
        self.events.append(Event(kind, step, message))
        if self._ranks.is_first:
            _inform(message)

    def say(self, message: str) -> None:
        """What befell nobody, for those who want to know: no event."""
        if self._ranks.is_first:
            _logger.info(message)

    def resumed(self, config: Config, state: State, step: int, planned: Config, saved: Mapping[str, Any]) -> None:
        """Warn where a run goes on that is over, not as long as `planned`, or not in the steps that it was `saved` with."""
        message = resume_message(config, state, step, planned)
        if message is None and (before := saved["config"])["steps_per_epoch"] != config.steps_per_epoch:
            had = f"an epoch has {config.steps_per_epoch} steps here and had {before['steps_per_epoch']} in the state"
            place = f"it goes on from step {step} of {config.total_steps}, and was at step {saved['last_epoch']}"
            message = f"{had}: the run keeps its place in epochs, {place} of {before['total_steps']}; the LRs are as they were"
        if message:
            self.warn("resume", step, message)

    def state_dict(self) -> list[dict[str, Any]]:
        """All events but those of kind "resume", which speak of the object that a state was loaded into, not of the run."""
        return [vars(event).copy() for event in self.events if event.kind != "resume"]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.events = [Event(**event) for event in state]


def _inform(message: str) -> None:
    """Log at level INFO. Where no logging was set up, say it on stderr, as logging itself says a warning there.

    That is left out where the logger was given a level above INFO, is filtered or disabled, or ``logging.lastResort`` is None.
    """
    last = logging.lastResort
    if last is None or _logger.hasHandlers():
        _logger.info(message)
    elif _logger.level <= logging.INFO and not _logger.disabled and _logger.manager.disable < logging.INFO:
        record = _logger.makeRecord(_logger.name, logging.INFO, __file__, 0, message, (), None)
        if _logger.filter(record):
            last.emit(record)


def in_words(lrs: Sequence[float]) -> str:
    """The LR of the one optimizer, or those of all."""
    return " and ".join(f"{lr:.4g}" for lr in lrs)


def not_finite_message(restored: int) -> str:
    """What is said of a warm-up that goes on after losses that were not finite."""
    cause = "the loss fell and is not finite any more, which one batch may have done"
    return f"{cause}: back at the copy of step {restored}, and the warm-up goes on"


def switch_message(config: Config, switch: Switch, ended_by: str, restored: int | None) -> str:
    """What is said of a switch. `ended_by`: why the warm-up ended where no test did; `restored`: step of the copy put back."""
    found = "no curve was fitted; LR from the optimizer's own"
    if switch.minimum is not None:
        why = f" (probability {switch.probability:.3f})" if switch.by_test else ended_by
        found = f"the loss was lowest at step {switch.minimum:.0f}{why}"
    of = "" if config.total_steps is None else f" of {config.total_steps}"
    where = f"AutoWU switched at step {switch.step}{of}: LR {in_words(switch.lrs)}"
    return f"{where}, {found}{_back_at(restored)}"


def range_message(config: Config, after: Config, share: float, restored: int | None) -> str:
    """What is said where the first step has moved the weights by an unusual `share` of their norm: another LR range follows."""
    moved = f"the first step, at LR {config.min_lr:.4g}, moved the weights by {share:.2g} of their norm"
    unusual = f"far {'more' if after.min_lr < config.min_lr else 'less'} than is usual"
    return f"AutoWU: {moved}, {unusual}: the LR range is now {after.min_lr:.4g} to {after.max_lr:.4g}{_back_at(restored)}"


def doubt_message(config: Config, switch: Switch) -> str | None:
    """What is to be doubted of the LR that a switch goes on with; None for nothing."""
    if switch.minimum is None:
        cure = "pass a finite loss with every scheduler.step, or train for more steps"
        own = f"the LR {in_words(switch.lrs)} is the optimizer's own and untested"
        return f"no loss curve could be fitted in the warm-up; {own}; {cure}"
    if any(lr <= one.min_lr for one, lr in zip(each_config(config), switch.lrs, strict=True)):
        cure = "see whether the loss falls at all, or pass a lower min_lr"
        return f"the loss was lowest so near the start of the warm-up that no LR was found; the peak is held at min_lr; {cure}"
    return None


def divergence_message(state: State, restored: int | None, *, at_once: bool = False) -> str:
    """What is said of a divergence, after which the run has `state`. `restored`: step of the copy that was put back.

    `at_once`: the loss was no longer finite a few steps after the run had gone back before.
    """
    most = most_setbacks(state)
    lowered = f"training has diverged ({state.setbacks} of {most}); the peak LR is now {in_words(peak_lrs(state))}"
    after = ""
    if state.setbacks == MAX_EXPLOSIONS or (state.setbacks >= MAX_SETBACKS and restored is None):
        after = "; from here on the run is left alone"
    elif state.setbacks == MAX_SETBACKS:
        after = "; from here on only a loss that explodes lowers it"
    if at_once:
        after += "; if no lower LR helps, look for NaN in the data, or for a GradScaler whose scale has fallen to 0"
    return f"{lowered}{_back_at(restored)}{after}"


def overfitting_message(state: State, level: float, best: float, restored: int | None) -> str:
    """What is said where the held-out loss is at `level`, after a `best`; the run has `state` after that."""
    peak = in_words(peak_lrs(state))
    return f"the held-out loss was {best:.4g} and is {level:.4g}: the peak LR is now {peak}{_back_at(restored)}"


def ramp_message(state: State, edge: float | None, risen: bool, factor: float, restored: int | None) -> str:
    """What is said of a ramp, after which the run has `state`, its peak LR raised by a `factor`.

    `edge`: times the peak LR at which the loss had `risen`, or had not; None where the ramp was cut short.
    """
    found = "was cut short"
    if edge is not None:
        found = f"saw the loss rise at {edge:.3g} times it" if risen else f"saw no rise up to {edge:.3g} times it"
    peak = f"it is now {in_words(peak_lrs(state))}" if factor > 1 else f"it stays {in_words(peak_lrs(state))}"
    return f"AutoWU, a second look at the peak LR {found}; {peak}{_back_at(restored)}"


def end_message(config: Config, state: State) -> str:
    """What is said of steps past the end of a run."""
    total = config.total_steps
    assert total is not None
    lr = in_words(each_lr(all_lrs(config, state, total)))
    return f"the run is over since step {total}: the LR stays at {lr}; scheduler.extend(total_steps=...) makes it longer"


def resume_message(config: Config, state: State, step: int, planned: Config) -> str | None:
    """What is said of a run that goes on from `step`, if it is over or not as long as `planned` by the object that takes it up."""
    total = config.total_steps
    if config.budget is not None and step < config.end:
        return None
    if total is None:
        if planned.total_steps is None:
            return None
        cure = f"scheduler.extend(total_steps={planned.total_steps}) gives it one"
        return f"the run of this state has no fixed end, that of the arguments given now ends at step {planned.total_steps}; {cure}"
    if step >= total:
        lr = in_words(each_lr(all_lrs(config, state, total)))
        cure = "more total_epochs, or total_steps, than the state's extend it, as scheduler.extend does"
        return f"the run of this state is over, its {total} steps are taken; the LR stays at {lr}; {cure}"
    if planned.total_steps is None:  # a run whose end was open, and came
        return None
    end, own, other = planned.total_steps, config.steps_per_epoch, planned.steps_per_epoch
    if own and other and own != other:
        end = max(step, step + round(planned.total_steps - step * other / own))
    if end == total:
        return None
    what = f"will not change from step {total} on{_lr_at(config, state, total)}"
    if end < total:
        what = f"will not have come to its end{_lr_at(config, state, end)}"
    cure = f"take up the run with its {total} steps, or more to extend it"
    if own != other:
        cure = f"take it up with steps_per_epoch={own}, as it was begun, or let it take {total - step} steps more"
    return f"the run of this state has {total} steps, that of the arguments given now ends at step {end}; the LR {what}; {cure}"


def _lr_at(config: Config, state: State, step: int) -> str:
    """The LR of a later step, where it is known: after the switch."""
    if state.switch is None:
        return ""
    return f" ({in_words(each_lr(all_lrs(config, state, step)))}, in {phase_at(config, state, step)})"


def loss_changed_message(state: State, now: float, before: float, risen: float | None = None) -> str:
    """What is said where going back has not brought the loss back, which is at `now`, or, having `risen`, no lower LR has.

    The run has `state` after that.
    """
    found = f"the loss is {now:.4g} on the weights of the copy, too, and was {before:.4g} when it was made"
    if risen is not None:
        found = f"the loss rose from {before:.4g} by {risen:.4g}, and what it did then is not what weights do at a lower LR"
    return f"{found}: the loss has changed, training has not diverged; the peak LR is {in_words(peak_lrs(state))} again"


def _back_at(restored: int | None) -> str:
    return "" if restored is None else f", model and optimizer are back at step {restored}"


def back_at(event: Event) -> int | None:
    """Step of the copy that was put back, by the words of an event; None for none."""
    found = re.search(_back_at(0).replace("0", r"(\d+)"), event.message)
    return None if found is None else int(found[1])
