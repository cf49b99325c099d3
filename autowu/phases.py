"""What AutoWU does at which step: a frozen configuration, a frozen state, and pure functions of the two.

A run of T optimizer steps passes through *warmup*, then, unless the cooldown is immediate, *stable*, then *cooldown*; from step
T on it is *done*. The LR of any step, past or future, follows from the configuration and the state alone.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from autowu.schedules import COOLDOWN_TYPES, WARMUP_TYPES, cooldown_factor, decades, warmup_lr
from autowu.switching import SwitchDecision

__all__ = [
    "Config",
    "Event",
    "Phase",
    "State",
    "Switch",
    "Verdict",
    "after_test",
    "base_lr",
    "configure",
    "cooldown_start",
    "end_plateau_epoch",
    "extended",
    "falls",
    "forked",
    "is_test_due",
    "phase_at",
    "plateau_epoch_due",
    "set_back",
    "verdict",
    "watch_is_over",
]

Phase = Literal["warmup", "stable", "cooldown", "done"]

TESTS_PER_WARMUP: Final = 60
MAX_LAG: Final = 0.5
"""Decades of LR: what a fitted curve can tell apart, and so the most that the loss of a warm-up counts as lagging behind its LR."""
FALLING: Final = 0.8
"""A test that finds the minimum past with less than this probability says that the loss still falls."""
SETBACK_FACTOR: Final = 0.5
"""On the peak LR, each time that training has diverged after the switch."""
MAX_SETBACKS: Final = 3
"""After so many the run is left alone."""
WATCHED_DOWN_TO: Final = 0.5
"""Share of the peak LR: a cooldown that has come below it is not watched any longer."""
PLATEAU_PATIENCE: Final = 5
"""Epochs without a better mean loss before `decay_phase_stat="loss"` lowers the LR (Kim et al. 2021 and its code)."""
PLATEAU_THRESHOLD: Final = 1e-4
"""A mean loss is better if it is lower by more than this share of the best: the default of torch's ReduceLROnPlateau."""


@dataclass(frozen=True)
class Config:
    """The arguments of a run, checked and resolved; steps are optimizer steps. Built by :func:`configure`.

    Attributes:
        total_steps: T.
        steps_per_epoch: None for a run that was given `total_steps` only.
        warmup_steps: length W of the axis on which the LR would grow from `min_lr` to `max_lr`.
        warmup_limit: step at which a warm-up ends without a switch: W, or the start of the cooldown where that comes first.
        cooldown_fraction, cooldown_start: share of T for the cooldown and its first step, used where it is not immediate.
        test_interval: steps between tests.
        peak_factor: the peak LR over that at the minimum, the lag included.
    """

    total_steps: int
    steps_per_epoch: int | None
    min_lr: float
    max_lr: float
    warmup_steps: int
    warmup_limit: int
    warmup_type: str
    warmup_unit: str
    immediate_cooldown: bool
    cooldown_type: str
    cooldown_fraction: float
    cooldown_start: int
    decay_phase_stat: str | None
    decay_phase_factor: float
    test_interval: int
    patience: int
    confidence: float
    min_contrast: float
    peak_factor: float
    watch: bool


@dataclass(frozen=True)
class Event:
    """Something that befell a run.

    Attributes:
        kind: "switch"; "explosion", a loss that ended the warm-up at once; "divergence", after the switch; or the kind of a trouble
            that was survived, told once a run: "loss", "fit", "rank", "snapshot", "optimizer".
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
        lr: the peak LR, of the parameter group with the largest LR.
        probability: of the minimum being past, as the last test put it, in [0, 1]; None where no test succeeded.
        minimum: where the fitted curve is lowest, in steps, fractional; None where no test succeeded.
        by_test: False where the warm-up reached its limit without a switch, or a loss that exploded ended it.
    """

    step: int
    lr: float
    probability: float | None
    minimum: float | None
    by_test: bool


@dataclass(frozen=True)
class Verdict:
    """Outcome of a test in the five numbers that all processes of a run must share.

    Attributes:
        switch: whether to switch.
        votes: tests in a row, this one included, that found the minimum past.
        probability: of the minimum being past, in [0, 1].
        lr: the peak LR that follows: `peak_factor` times the LR at the minimum, the mean over the subsamples.
        minimum: where the fitted curve is lowest, in steps, fractional.
    """

    switch: bool
    votes: int
    probability: float
    lr: float
    minimum: float


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Attributes:
        votes: tests in a row that found the minimum past.
        switch: None during the warm-up.
        plateau_factor, best_epoch_loss, bad_epochs: of the plateau rule, `decay_phase_stat="loss"`: the factor on the peak LR, the
            lowest mean loss of an epoch, and the epochs since.
        setbacks: number of divergences since the switch, each of which has halved the peak LR.
        watched: whether the watch over the run goes on.
    """

    votes: int = 0
    switch: Switch | None = None
    plateau_factor: float = 1.0
    best_epoch_loss: float = math.inf
    bad_epochs: int = 0
    setbacks: int = 0
    watched: bool = True


def phase_at(config: Config, state: State, step: int) -> Phase:
    """Phase of optimizer step `step`."""
    if step >= config.total_steps:
        return "done"
    if state.switch is None or step < state.switch.step:
        return "warmup"
    if config.immediate_cooldown or step >= config.cooldown_start:
        return "cooldown"
    return "stable"


def base_lr(config: Config, state: State, step: int) -> float:
    """LR of optimizer step `step`, of the parameter group with the largest LR.

    The first step after a switch runs at the peak, the last step of the run above 0, and every step after it at that same LR.
    """
    step = min(step, config.total_steps - 1)
    if state.switch is None or step < state.switch.step:
        return _warmup_lr(config, step)
    start = state.switch.step
    if not config.immediate_cooldown:
        start = max(start, config.cooldown_start)
    lr = state.switch.lr * state.plateau_factor * SETBACK_FACTOR**state.setbacks
    if config.decay_phase_factor != 1.0 and config.decay_phase_stat is None:
        assert config.steps_per_epoch is not None
        lr *= config.decay_phase_factor ** ((min(step, start) - state.switch.step) // config.steps_per_epoch)
    if step < start:
        return lr
    progress = (step - start) / (config.total_steps - start)
    return lr * cooldown_factor(progress, config.cooldown_type)


def _warmup_lr(config: Config, position: float) -> float:
    if config.warmup_unit == "epoch" and config.steps_per_epoch is not None:
        position = position // config.steps_per_epoch * config.steps_per_epoch
    return warmup_lr(position, config.warmup_steps, config.min_lr, config.max_lr, config.warmup_type)


def is_test_due(config: Config, state: State, step: int) -> bool:
    """Whether a test is due once `step` losses have been seen: every `test_interval` steps of warm-up, and at its limit."""
    if state.switch is not None or step > config.warmup_limit:
        return False
    return step % config.test_interval == 0 or step == config.warmup_limit


def verdict(config: Config, step: int, decision: SwitchDecision) -> Verdict:
    """What `decision`, on the losses of the first `step` steps, comes to."""
    minima = [min(m * config.warmup_steps, float(step)) for m in decision.minima]
    lr = config.peak_factor * sum(_warmup_lr(config, m) for m in minima) / len(minima)
    return Verdict(decision.switch, decision.votes, decision.probability, lr, sum(minima) / len(minima))


def falls(verdict: Verdict | None) -> bool:
    """Whether a test found that the loss still falls."""
    return verdict is not None and verdict.probability < FALLING


def after_test(config: Config, state: State, step: int, verdict: Verdict | None, fallback_lr: float, *, ends: bool) -> State:
    """The state after a test (or a failed one, `verdict` None) at `step`: switched, if the test says so or the warm-up ends here.

    A warm-up that ends with no verdict at all goes on at `fallback_lr`, brought into the LR range.
    """
    state = replace(state, votes=0 if verdict is None else verdict.votes)
    by_test = verdict is not None and verdict.switch
    if not by_test and not ends:
        return state
    if verdict is None:
        lr = min(max(fallback_lr, config.min_lr), config.max_lr)
        return replace(state, switch=Switch(step, lr, None, None, by_test=False))
    return replace(state, switch=Switch(step, verdict.lr, verdict.probability, verdict.minimum, by_test))


def set_back(state: State) -> State:
    """The state after a divergence: a lower peak, and after the last one that is borne no watch any longer."""
    setbacks = state.setbacks + 1
    return replace(state, setbacks=setbacks, watched=setbacks < MAX_SETBACKS)


def watch_is_over(config: Config, state: State, step: int) -> bool:
    """Whether the cooldown has brought the LR of optimizer step `step` so far down that training will not diverge."""
    if state.switch is None or phase_at(config, state, step) not in ("cooldown", "done"):
        return False
    top = base_lr(config, state, max(state.switch.step, 0 if config.immediate_cooldown else config.cooldown_start))
    return base_lr(config, state, step) < WATCHED_DOWN_TO * top


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


def configure(
    *,
    steps_per_epoch: int | None,
    total_epochs: int | None,
    total_steps: int | None,
    immediate_cooldown: bool,
    cooldown_type: str,
    cooldown_fraction: float,
    min_lr: float,
    max_lr: float,
    max_warmup_fraction: float,
    warmup_type: str,
    warmup_unit: str,
    decay_phase_stat: str | None,
    decay_phase_factor: float,
    test_interval: int | str | None,
    patience: int,
    confidence: float,
    min_contrast: float,
    peak_factor: float,
    peak_lag: float,
    watch: bool,
) -> Config:
    """Check the arguments of `AutoWU` and resolve them. `peak_lag`: steps by which the loss of a warm-up lags behind its LR.

    Raises:
        TypeError, ValueError: naming the argument, its value and what it may be.
    """
    total = _total_steps(steps_per_epoch, total_epochs, total_steps)
    _check_choice("cooldown_type", cooldown_type, COOLDOWN_TYPES)
    _check_choice("warmup_type", warmup_type, WARMUP_TYPES)
    _check_choice("warmup_unit", warmup_unit, ("step", "epoch"))
    _check_choice("decay_phase_stat", decay_phase_stat, (None, "loss"))
    _check_fraction("max_warmup_fraction", max_warmup_fraction, closed=True)
    _check_fraction("cooldown_fraction", cooldown_fraction)
    _check_fraction("decay_phase_factor", decay_phase_factor, closed=True)
    _check_real("confidence", confidence, 0.5 < _number(confidence) < 1, "between 0.5 and 1")
    _check_real("min_contrast", min_contrast, 0 <= _number(min_contrast) < math.inf, "at least 0 and finite")
    _check_fraction("peak_factor", peak_factor, closed=True)
    _check_real("min_lr", min_lr, 0 < _number(min_lr) < math.inf, "above 0 and finite")
    _check_real("max_lr", max_lr, 0 < _number(max_lr) < math.inf, "above 0 and finite")
    if not min_lr < max_lr:
        raise ValueError(f"min_lr={min_lr!r}: must be below max_lr={max_lr!r}")
    patience = _check_count("patience", patience)
    for name, flag in (("immediate_cooldown", immediate_cooldown), ("watch", watch)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r}: must be True or False")

    if steps_per_epoch is None:
        for name, value in (("warmup_unit", warmup_unit), ("test_interval", test_interval)):
            if value == "epoch":
                raise ValueError(f"{name}='epoch': needs steps_per_epoch, but total_steps was given")
        if decay_phase_stat is not None or decay_phase_factor != 1.0:
            raise ValueError(
                f"decay_phase_stat={decay_phase_stat!r}, decay_phase_factor={decay_phase_factor!r}: "
                "act once an epoch and need steps_per_epoch, but total_steps was given"
            )
    if immediate_cooldown and (decay_phase_stat is not None or decay_phase_factor != 1.0):
        raise ValueError(
            f"decay_phase_stat={decay_phase_stat!r}, decay_phase_factor={decay_phase_factor!r}: act on the "
            "constant phase, which immediate_cooldown=True leaves out; pass immediate_cooldown=False"
        )
    if decay_phase_stat == "loss" and decay_phase_factor == 1.0:
        raise ValueError("decay_phase_factor=1.0: with decay_phase_stat='loss' it must be above 0 and below 1")

    # The shortest of runs has one step of warm-up.
    warmup_steps = int(max_warmup_fraction * total) or round(max_warmup_fraction * total)
    cooldown_start = _cooldown_start(total, cooldown_fraction)
    limit = warmup_steps if immediate_cooldown else min(warmup_steps, cooldown_start)
    if not 1 <= limit < total:
        raise ValueError(
            f"max_warmup_fraction={max_warmup_fraction!r}: leaves {limit} steps of warm-up in a run of {total} steps; "
            f"both the warm-up and the rest of the run need at least 1 step"
        )
    if test_interval is None:
        interval = max(1, round(limit / TESTS_PER_WARMUP))
    elif test_interval == "epoch":
        assert steps_per_epoch is not None
        interval = int(steps_per_epoch)
    else:
        if isinstance(test_interval, str):
            raise ValueError(f"test_interval={test_interval!r}: must be an integer, 'epoch' or None")
        interval = _check_count("test_interval", test_interval)
    span = decades(min_lr, max_lr, warmup_type)
    lag = min(peak_lag * span / warmup_steps, MAX_LAG) if span else 0.0
    return Config(
        total_steps=total,
        steps_per_epoch=None if steps_per_epoch is None else int(steps_per_epoch),
        min_lr=float(min_lr),
        max_lr=float(max_lr),
        warmup_steps=warmup_steps,
        warmup_limit=limit,
        warmup_type=warmup_type,
        warmup_unit=warmup_unit,
        immediate_cooldown=immediate_cooldown,
        cooldown_type=cooldown_type,
        cooldown_fraction=float(cooldown_fraction),
        cooldown_start=cooldown_start,
        decay_phase_stat=decay_phase_stat,
        decay_phase_factor=float(decay_phase_factor),
        test_interval=interval,
        patience=patience,
        confidence=float(confidence),
        min_contrast=float(min_contrast),
        peak_factor=float(peak_factor) * 10**-lag,
        watch=watch,
    )


def extended(config: Config, other: Config) -> Config:
    """`config` with the length of `other`, if that is the longer: in epochs, or in steps where neither has epochs.

    The warm-up stays as it is; the cooldown moves to the new end.
    """
    if config.steps_per_epoch is not None and other.steps_per_epoch is not None:
        total = config.steps_per_epoch * (other.total_steps // other.steps_per_epoch)
    elif config.steps_per_epoch is None and other.steps_per_epoch is None:
        total = other.total_steps
    else:
        return config
    if total <= config.total_steps:
        return config
    return replace(config, total_steps=total, cooldown_start=_cooldown_start(total, config.cooldown_fraction))


def cooldown_start(config: Config, cooldown_fraction: float) -> int:
    """Step at which a cooldown over the last `cooldown_fraction` of the run begins.

    Raises:
        TypeError, ValueError: unless the fraction is a number above 0 and below 1.
    """
    _check_fraction("cooldown_fraction", cooldown_fraction)
    return _cooldown_start(config.total_steps, cooldown_fraction)


def forked(config: Config, step: int, cooldown_fraction: float) -> Config:
    """The configuration of a run with another `cooldown_fraction`, if it could stand at `step` as a run of `config` does.

    Raises:
        TypeError, ValueError: naming the argument, its value and what it may be.
    """
    start = cooldown_start(config, cooldown_fraction)
    if config.immediate_cooldown:
        raise ValueError(
            f"cooldown_fraction={cooldown_fraction!r}: without effect in a run with immediate_cooldown=True; "
            "a run to fork needs immediate_cooldown=False"
        )
    if min(config.warmup_steps, start) != config.warmup_limit:
        raise ValueError(
            f"cooldown_fraction={cooldown_fraction!r}: the warm-up would end by step {min(config.warmup_steps, start)}, not by "
            f"step {config.warmup_limit} as in this run; both cooldowns must begin at step {config.warmup_steps} or later"
        )
    latest = min(start, config.cooldown_start)
    if config.decay_phase_stat == "loss" and start != config.cooldown_start:
        latest -= 1  # of an epoch that ends where one of the cooldowns begins only the other run takes note
    if step > latest:
        raise ValueError(
            f"cooldown_fraction={cooldown_fraction!r}: must be forked off at step {latest} or before, the run is at step {step}"
        )
    return replace(config, cooldown_fraction=float(cooldown_fraction), cooldown_start=start)


def _cooldown_start(total_steps: int, cooldown_fraction: float) -> int:
    return total_steps - max(1, round(cooldown_fraction * total_steps))


def _total_steps(steps_per_epoch: int | None, total_epochs: int | None, total_steps: int | None) -> int:
    if total_steps is not None:
        if steps_per_epoch is not None or total_epochs is not None:
            raise ValueError(
                f"total_steps={total_steps!r}: give it or steps_per_epoch={steps_per_epoch!r} and "
                f"total_epochs={total_epochs!r}, not both"
            )
        return _check_count("total_steps", total_steps)
    if steps_per_epoch is None or total_epochs is None:
        raise TypeError(f"steps_per_epoch={steps_per_epoch!r}, total_epochs={total_epochs!r}: give both, or total_steps")
    return _check_count("steps_per_epoch", steps_per_epoch) * _check_count("total_epochs", total_epochs)


def _check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: must be an integer, at least 1")
    if value < 1:
        raise ValueError(f"{name}={value!r}: must be at least 1")
    return int(value)


def _number(value: Any) -> float:
    """`value` if it is a real number, NaN, which is in no range, if it is not."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def _check_real(name: str, value: Any, in_range: bool, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: must be a number {allowed}")
    if not in_range:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def _check_fraction(name: str, value: Any, closed: bool = False) -> None:
    in_range = 0 < _number(value) <= 1 if closed else 0 < _number(value) < 1
    _check_real(name, value, in_range, f"above 0 and {'at most' if closed else 'below'} 1")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
