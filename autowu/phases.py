"""What AutoWU does at which step: a frozen configuration, a frozen state, and pure functions of the two.

A run of T optimizer steps passes through *warmup*, then, unless the cooldown is immediate, *stable*, then *cooldown*; from step
T on it is *done*. Where the end is open it stays *stable*. The LR of any step, past or future, follows from the configuration
and the state alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from autowu.config import MAX_WARMUP_FRACTION, Config, brief
from autowu.schedules import COOLDOWNS, STABLES, WARMUPS, warmup_lr
from autowu.switching import MIN_LOSSES, SwitchDecision

__all__ = [
    "Config",
    "Event",
    "LRRule",
    "LRs",
    "Phase",
    "RampPlan",
    "State",
    "Switch",
    "Verdict",
    "after_test",
    "all_lrs",
    "base_lr",
    "batch_changed",
    "common_lr",
    "cooldown_begin",
    "cooldown_progress",
    "copy_share",
    "each_config",
    "each_lr",
    "end_plateau_epoch",
    "exploded",
    "falls",
    "first_switch",
    "is_test_due",
    "lower",
    "lowered",
    "most_setbacks",
    "next_test",
    "peak_lrs",
    "phase_at",
    "plateau_epoch_due",
    "ramp_of",
    "set_back",
    "state_of",
    "switched",
    "undo_set_backs",
    "verdict",
    "verdict_of",
    "warmup_lr_at",
]

Phase = Literal["warmup", "stable", "cooldown", "done"]
LRs: TypeAlias = "float | tuple[float, ...]"
"""Of one optimizer its LR, of several one LR each."""

FALLING: Final = 0.8
"""A test that finds the minimum past with less than this probability says that the loss still falls."""
BEFORE: Final = 4
"""Verdicts that are kept beside the last one, for a run that explodes."""
_AT_START: Final = 0.25
"""Share of a warm-up so far in which the lowest point means that the loss has hardly fallen before it exploded."""
SETBACK_FACTOR: Final = 0.5
"""On the peak LR, each time that training has diverged after the switch."""
MAX_SETBACKS: Final = 3
"""After so many only a loss that explodes sets a run back, and without a copy to go back to nothing does."""
MAX_EXPLOSIONS: Final = 10
"""After so many setbacks the run is left alone."""
WATCHED_DOWN_TO: Final = 0.5
"""Share of the peak LR: a cooldown that has come below it is not watched any longer."""
PLATEAU_PATIENCE: Final = 5
"""Epochs without a better mean loss before `decay_phase_stat="loss"` lowers the LR (Kim et al. 2021 and its code)."""
PLATEAU_THRESHOLD: Final = 1e-4
"""A mean loss is better if it is lower by more than this share of the best: the default of torch's ReduceLROnPlateau."""


@dataclass(frozen=True)
class Event:
    """Something that befell a run.

    Attributes:
        kind: "switch"; "explosion", a loss that ended the warm-up at once; "not_finite", one that sent it back to a copy;
            "divergence", after the switch; "loss_changed", where the last of these was none; "overfitting", by held-out losses;
            "range", an LR range widened by what the first step did; "ramp", a second look at the peak LR; "lost", weights that
            no copy mends; or the kind of a trouble that was survived, told once: "loss", "held_out", "fit", "rank", "snapshot",
            "on_rollback", "optimizer", "peak", "calls", "skipped", "frozen", "model", "lr", "resume", "end"; or "cooldown",
            "extended", "rewarm", which were asked for, the first also by a loss that has stopped improving.
        step: optimizer steps taken by then.
        message: what the log said.
    """

    kind: str
    step: int
    message: str


@dataclass(frozen=True)
class Switch:
    """The end of the warm-up.

    Attributes:
        step: optimizer step that is the first at the peak LR, in steps from 0; as many losses had been seen.
        lr: the peak LR, of the parameter group with the largest LR; of several optimizers that of the first.
        probability: of the minimum being past, as the last test put it, in [0, 1]; None where no test succeeded.
        minimum: where the fitted curve is lowest, in steps, fractional; None where no test succeeded.
        by_test: False where the warm-up reached its limit without a switch, or a loss that exploded ended it.
        others: the peak LRs of the other optimizers, where there are several.
    """

    step: int
    lr: float
    probability: float | None
    minimum: float | None
    by_test: bool
    others: tuple[float, ...] = ()

    @property
    def lrs(self) -> tuple[float, ...]:
        """The peak LR of each optimizer."""
        return self.lr, *self.others

    __repr__ = brief


@dataclass(frozen=True)
class Verdict:
    """Outcome of a test in the numbers that all processes of a run must share.

    Attributes:
        switch: whether to switch.
        votes: tests in a row, this one included, that found the minimum past.
        probability: of the minimum being past, in [0, 1].
        lr: the peak LR that follows: `peak_factor` times the LR at the far edge of the minimum's valley, the mean over the
            subsamples, at least `min_lr`.
        minimum: where the fitted curve is lowest, in steps, fractional.
        others: the peak LRs of the other optimizers, where there are several.
    """

    switch: bool
    votes: int
    probability: float
    lr: float
    minimum: float
    others: tuple[float, ...] = ()

    @property
    def numbers(self) -> list[float]:
        """As numbers alone."""
        return [float(value) for value in (self.switch, self.votes, self.probability, self.lr, self.minimum, *self.others)]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Verdict:
        """The verdict that :attr:`numbers` were taken of."""
        switch, votes, probability, lr, minimum, *others = numbers
        return cls(bool(switch), int(votes), probability, lr, minimum, tuple(others))


@dataclass(frozen=True)
class RampPlan:
    """A ramp that is under way: from step `begin` on the LR grows to `span` times the peak, over so many `steps`."""

    begin: int
    steps: int
    span: float

    def factor(self, step: int) -> float:
        """On the LR of optimizer step `step`."""
        return float(self.span ** ((step - self.begin) / self.steps)) if 0 <= step - self.begin < self.steps else 1.0


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Attributes:
        votes: tests in a row that found the minimum past.
        switch: None during the warm-up.
        plateau_factor: on the peak LR, by the plateau rule, `decay_phase_stat="loss"`, and by held-out losses.
        best_epoch_loss, bad_epochs: of the plateau rule: the lowest mean loss of an epoch, and the epochs since.
        setbacks: number of divergences since the switch, each of which has halved the peak LR.
        watched: whether the watch over the run goes on.
        start_loss, settled: with `cooldown="auto"` the loss that the run began at, None where it is not known, and whether the
            loss has stopped improving.
        again: whether the warm-up was begun anew.
        batch, batch_factor: the batch size that the run was told last, None for none, and the factor on the peak LR that follows.
        ramp, ramps, raised: the ramp that is under way, None for none; how many were begun, all of them where the last has found
            the peak LR right; and the factor on the peak LR that followed.
    """

    votes: int = 0
    switch: Switch | None = None
    plateau_factor: float = 1.0
    best_epoch_loss: float = math.inf
    bad_epochs: int = 0
    setbacks: int = 0
    watched: bool = True
    start_loss: float | None = None
    settled: bool = False
    again: bool = False
    batch: int | None = None
    batch_factor: float = 1.0
    ramp: RampPlan | None = None
    ramps: int = 0
    raised: float = 1.0

    @property
    def factor(self) -> float:
        """On the peak LR, by all that lowers or raises it."""
        return SETBACK_FACTOR**self.setbacks * self.batch_factor * self.plateau_factor * self.raised


def verdict_of(saved: Mapping[str, Any]) -> Verdict:
    """The verdict that :func:`dataclasses.asdict` was taken of."""
    return Verdict(**(dict(saved) | {"others": tuple(saved.get("others", ()))}))


def state_of(saved: Mapping[str, Any]) -> State:
    """The state that :func:`dataclasses.asdict` was taken of."""
    switch = saved["switch"]
    if switch is not None:
        switch = Switch(**(dict(switch) | {"others": tuple(switch.get("others", ()))}))
    return State(**(dict(saved) | {"switch": switch, "ramp": ramp_of(saved.get("ramp"))}))


def ramp_of(saved: Mapping[str, Any] | None) -> RampPlan | None:
    """The plan that :func:`dataclasses.asdict` was taken of, None for none."""
    return None if saved is None else RampPlan(**saved)


def phase_at(config: Config, state: State, step: int) -> Phase:
    """Phase of optimizer step `step`."""
    if step >= config.end:
        return "done"
    if state.switch is None or step < state.switch.step:
        return "warmup"
    if config.immediate_cooldown or step >= config.cooldown_from:
        return "cooldown"
    return "stable"


class LRRule:
    """The LRs of a run by what is known now. What does not change from step to step is looked up once: it is asked at each."""

    def __init__(self, config: Config, state: State) -> None:
        self.config, self.state = config, state
        self._last, self._origin, self._steps = config.end - 1, config.warmup_origin, config.warmup_steps
        self._rise, self._low, self._high = WARMUPS[config.warmup_type], config.min_lr, config.max_lr
        self._epoch = config.steps_per_epoch if config.warmup_unit == "epoch" else None
        self._switch = self._cooldown = math.inf
        if (switch := state.switch) is not None:
            self._switch, self._cooldown = switch.step, cooldown_begin(config, switch)
            self._peak = switch.lr * state.factor
        self._fall, self._length = COOLDOWNS[config.cooldown_type], config.end - self._cooldown
        self._replanned, self._ramp = config.replanned_at is not None, state.ramp
        self._stable, self._timescale = STABLES[config.stable_type], config.warmup_steps / MAX_WARMUP_FRACTION
        self._stairs = config.decay_phase_factor if config.decay_phase_stat is None else 1.0
        self._is_held = config.stable_type == "constant" and self._stairs == 1.0
        self._watched_down_to = WATCHED_DOWN_TO * self.at(int(self._cooldown)) if self._cooldown < math.inf else 0.0

    def __reduce__(self) -> tuple[type[LRRule], tuple[Config, State]]:
        return LRRule, (self.config, self.state)

    def at(self, step: int) -> float:
        """LR of optimizer step `step`, of the parameter group with the largest LR."""
        if step > self._last:
            step = int(self._last)
        if step < self._switch:
            return self.in_warmup(step - self._origin if step > self._origin else 0)
        lr, start = self._peak, self._cooldown
        if not self._is_held:
            lr *= self._share_in_stable(min(step, start))
        if step < start:
            return lr if self._ramp is None else lr * self._ramp.factor(step)
        if self._replanned:
            return lr * self._fall(cooldown_progress(self.config, start, step))
        return lr * self._fall((step - start) / self._length)

    def _share_in_stable(self, step: float) -> float:
        """Share of the peak LR at `step` of the stable phase."""
        age = step - min(self._origin, self._switch)  # a loss may end a warm-up that still waits for its length
        share = self._stable(age / self._timescale)
        if self.config.steps_per_epoch is not None:
            share *= self._stairs ** ((step - self._switch) // self.config.steps_per_epoch)
        return share

    def in_warmup(self, position: float) -> float:
        """LR at `position` of the warm-up, in steps: :func:`~autowu.schedules.warmup_lr`, in whole epochs where it is by epoch."""
        if self._epoch is not None:
            position = position // self._epoch * self._epoch
        return self._rise(position / self._steps, self._low, self._high)

    def is_low(self, step: int) -> bool:
        """Whether the cooldown has brought the LR of optimizer step `step` so far down that training will not diverge."""
        return step >= self._cooldown and self.at(step) < self._watched_down_to


def base_lr(config: Config, state: State, step: int) -> float:
    """LR of optimizer step `step`, of the parameter group with the largest LR.

    The first step after a switch runs at the peak, the last step of the run above 0, and every step after it at that same LR.
    """
    return LRRule(config, state).at(step)


def all_lrs(config: Config, state: State, step: int) -> LRs:
    """LRs of optimizer step `step`: that of the one optimizer, as :func:`base_lr` says, or those of all."""
    first = base_lr(config, state, step)
    if not config.others:
        return first
    if state.switch is None or step < state.switch.step:
        position = max(min(step, config.end - 1) - config.warmup_origin, 0)
        return first, *(warmup_lr_at(one, position) for one in each_config(config)[1:])
    share = first / state.switch.lr
    return first, *(share * peak for peak in state.switch.others)


def each_lr(lrs: LRs) -> tuple[float, ...]:
    """Those of several optimizers; of one its own."""
    return lrs if isinstance(lrs, tuple) else (lrs,)


def lower(some: LRs, others: LRs) -> LRs:
    """The lower LR, of several optimizers for each."""
    least = tuple(map(min, each_lr(some), each_lr(others)))
    return least if isinstance(some, tuple) else least[0]


def each_config(config: Config) -> list[Config]:
    """The configuration as one of each optimizer alone."""
    if not config.others:
        return [config]
    own = ((config.min_lr, config.max_lr, config.peak_factor), *config.others)
    return [replace(config, min_lr=low, max_lr=high, peak_factor=factor, others=()) for low, high, factor in own]


def cooldown_begin(config: Config, switch: Switch) -> float:
    """First step of the cooldown of a run that has made its `switch`; infinite as long as it is open."""
    return switch.step if config.immediate_cooldown else max(switch.step, config.cooldown_from)


def cooldown_progress(config: Config, start: float, step: int) -> float:
    """Share of the cooldown from `start` on that lies behind at `step`; one that was replanned goes on from where it stood."""
    if config.replanned_at is None:
        return (step - start) / (config.end - start)
    begin, done = max(start, config.replanned_at), config.replanned_progress
    if step < begin:  # about where it was
        return done * (step - start) / (begin - start)
    return done + (1 - done) * ((step - begin) / (config.end - begin))


def warmup_lr_at(config: Config, position: float) -> float:
    """LR at `position` of the warm-up, in steps, of the parameter group with the largest LR."""
    return LRRule(config, State()).in_warmup(position)


def is_test_due(config: Config, state: State, step: int) -> bool:
    """Whether a test is due after `step` steps of the run: every `test_interval` steps of warm-up, and at its limit."""
    position = step - config.warmup_origin
    if state.switch is not None or not 1 <= position <= config.warmup_limit:
        return False
    return position % config.test_interval == 0 or position == config.warmup_limit


def next_test(config: Config, step: int) -> int:
    """The step of the first test after `step`, within the warm-up or not."""
    position = step - config.warmup_origin
    if position < 0:
        return step + 1
    after = position + config.test_interval - position % config.test_interval
    return config.warmup_origin + (config.warmup_limit if position < config.warmup_limit < after else after)


def first_switch(config: Config, *, alone: bool) -> int:
    """The step of the earliest switch by test: enough losses, then votes in a row; of several ranks a verdict is a test late."""
    first_vote = -(-MIN_LOSSES // config.test_interval) * config.test_interval
    return first_vote + (config.patience - 1 + (not alone)) * config.test_interval


def verdict(config: Config, step: int, decision: SwitchDecision) -> Verdict:
    """What `decision`, on the losses of the first `step` steps, comes to."""
    origin = config.warmup_origin
    minima, edges = (
        [min(m * config.warmup_steps, float(step - origin)) for m in places] for places in (decision.minima, decision.edges)
    )
    lr, *others = (max(_peak(one, edges), one.min_lr) for one in each_config(config))
    minimum = origin + sum(minima) / len(minima)
    return Verdict(decision.switch, decision.votes, decision.probability, lr, minimum, tuple(others))


def _peak(config: Config, places: Sequence[float]) -> float:
    """The peak LR that follows from these places in the warm-up, the mean over them."""
    return config.peak_factor * sum(warmup_lr_at(config, place) for place in places) / len(places)


def falls(verdict: Verdict | None) -> bool:
    """Whether a test found that the loss still falls."""
    return verdict is not None and verdict.probability < FALLING


def after_test(config: Config, state: State, step: int, verdict: Verdict | None) -> State:
    """The state after a test (or a failed one, `verdict` None) at `step` within the warm-up: switched, if the test says so."""
    if verdict is None:
        return replace(state, votes=0)
    after = replace(state, votes=verdict.votes)
    return switched(config, after, step, verdict, 0.0) if verdict.switch else after


def switched(config: Config, state: State, step: int, verdict: Verdict | None, fallback_lr: LRs) -> State:
    """The state of a run whose warm-up ends at `step`, to go on from where `verdict` saw the minimum.

    With no verdict at all it goes on at `fallback_lr`, brought into the LR range.
    """
    if verdict is None:
        each = zip(each_config(config), each_lr(fallback_lr), strict=True)
        lr, *others = (min(max(own, one.min_lr), one.max_lr) for one, own in each)
        return replace(state, votes=0, switch=Switch(step, lr, None, None, by_test=False, others=tuple(others)))
    found = verdict.lr, verdict.probability, verdict.minimum
    switch = Switch(step, *found, by_test=verdict.switch, others=verdict.others)
    return replace(state, votes=verdict.votes, switch=switch)


def exploded(config: Config, state: State, before: Sequence[Verdict]) -> State:
    """The state of a run that a loss which exploded has switched: the peak LR is the median of what the tests `before` said.

    A curve that ends in an explosion has no far edge that can be trusted, for the explosion is in the spread that the edge is told
    by. Its lowest point is no better where the loss rested on a plateau before. It counts where there was no other test, and where
    it lies so near the start that all tests saw a curve without a fall.
    """
    if state.switch is None:
        return state
    switch = replace(state.switch, by_test=False)
    if not config.min_rise or switch.minimum is None:
        return replace(state, switch=switch)
    place = switch.minimum - config.warmup_origin
    if before and place >= _AT_START * (switch.step - config.warmup_origin):
        lr, *others = (float(np.median(lrs)) for lrs in zip(*((verdict.lr, *verdict.others) for verdict in before), strict=True))
    else:
        lr, *others = (max(_peak(one, [place]), one.min_lr) for one in each_config(config))
    return replace(state, switch=replace(switch, lr=lr, others=tuple(others)))


def common_lr(config: Config, switch: Switch) -> float:
    """The LR of the first optimizer at which, in the warm-up, no optimizer was above its peak LR yet."""
    if not switch.others:
        return switch.lr
    least = min(_share(one, lr) for one, lr in zip(each_config(config), switch.lrs, strict=True))
    shape = "linear" if config.warmup_type == "linear" else "exp"
    return min(switch.lr, warmup_lr(least, 1, config.min_lr, config.max_lr, shape))


def copy_share(config: Config) -> float:
    """`peak_factor`; of several optimizers the one that lies furthest back in the warm-up, in the LR of the first."""
    if not config.others:
        return config.peak_factor
    return math.exp(min(math.log(one.peak_factor) / _span(one) for one in each_config(config)) * _span(config))


def _span(config: Config) -> float:
    return math.log(config.max_lr / config.min_lr)


def _share(config: Config, lr: float) -> float:
    """How far an LR lies in the range of a warm-up: 0 at `min_lr`, 1 at `max_lr`."""
    if config.warmup_type == "linear":
        return (lr - config.min_lr) / (config.max_lr - config.min_lr)
    return math.log(lr / config.min_lr) / _span(config)


def peak_lrs(state: State) -> tuple[float, ...]:
    """The peak LR of each optimizer, after the switch, as all that lowers or raises it has left it.

    It is that of the parameter group with the largest LR.
    """
    assert state.switch is not None
    return tuple(lr * state.factor for lr in state.switch.lrs)


def set_back(state: State) -> State:
    """The state after a divergence: a lower peak."""
    return replace(state, setbacks=state.setbacks + 1)


def most_setbacks(state: State) -> int:
    """How many setbacks a run bears, of which it has had so many: more than the first few only where it explodes."""
    return MAX_SETBACKS if state.setbacks <= MAX_SETBACKS else MAX_EXPLOSIONS


def lowered(state: State) -> State:
    """The state after the held-out losses have passed their best: a lower peak, which is no sign of divergence."""
    return replace(state, plateau_factor=SETBACK_FACTOR * state.plateau_factor)


def undo_set_backs(state: State, times: int) -> State:
    """The state of a run whose last set-backs were none of its own: the loss had changed."""
    return replace(state, setbacks=max(0, state.setbacks - times))


def batch_changed(config: Config, state: State, step: int, size: int, rule: str) -> State:
    """The state of a run whose batches have another `size` from `step` on: after the switch the peak follows, by the `rule`.

    In a warm-up the LR is what is searched, at whatever size.
    """
    if state.batch is None or state.batch == size or phase_at(config, state, step) == "warmup":
        return replace(state, batch=size)
    ratio = size / state.batch
    return replace(state, batch=size, batch_factor=state.batch_factor * (ratio if rule == "linear" else math.sqrt(ratio)))


def plateau_epoch_due(config: Config, state: State, step: int) -> bool:
    """Whether an epoch of the stable phase, counted from the switch, ends with `step` and its mean loss is wanted."""
    return (
        config.decay_phase_stat == "loss"
        and config.steps_per_epoch is not None
        and state.switch is not None
        and step > state.switch.step
        and phase_at(config, state, step) == "stable"
        and (step - state.switch.step) % config.steps_per_epoch == 0
    )


def end_plateau_epoch(config: Config, state: State, mean_loss: float) -> State:
    """The state after an epoch of the stable phase with ``decay_phase_stat="loss"``: the rule of torch's ReduceLROnPlateau.

    As there, what counts as better is relative to the best mean loss; it is the one rule that a constant added to the loss changes.

    Args:
        mean_loss: mean of the epoch's finite losses, NaN if it had none (an epoch without progress).
    """
    best = state.best_epoch_loss
    if mean_loss < (best if math.isinf(best) else best - PLATEAU_THRESHOLD * abs(best)):
        return replace(state, best_epoch_loss=mean_loss, bad_epochs=0)
    if state.bad_epochs < PLATEAU_PATIENCE:
        return replace(state, bad_epochs=state.bad_epochs + 1)
    factor = state.plateau_factor * config.decay_phase_factor
    return replace(state, plateau_factor=factor, bad_epochs=0)
