"""Pure: the plan of a run that is changed on the way, from one configuration to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch.optim import Optimizer

from autowu.checks import fraction as fraction_of
from autowu.config import BUDGETS, Config, configure, lag_share, lengthened, warmup_share
from autowu.phases import State, all_lrs, cooldown_begin, cooldown_progress, each_config, each_lr, phase_at

__all__ = ["cooled", "curtailed", "larger", "longer", "measured", "opened", "rewarmed", "spent", "widened"]

_NO_BUDGET: Final[dict[str, Any]] = dict.fromkeys(BUDGETS)
_LEAST: Final = {"total_samples": 0.5, "total_tokens": 0.5, "total_seconds": 1.0}
"""Share of a usual step that must be left for another: a count is met as nearly as steps can, a deadline is not passed."""
_FARTHEST: Final = 2**40
"""Steps that a run is taken to have left, at most."""
_NOT_REPLANNED: Final[dict[str, Any]] = {"replanned_at": None, "replanned_progress": 0.0}


def cooled(config: Config, state: State, step: int, steps: int) -> Config:
    """The plan of a run that is over after `steps` more steps, the cooldown beginning, or going on, at `step`.

    It is that of a run which had this length, and this cooldown, from the start. Before the switch the warm-up is at its limit.
    """
    total, start = step + steps, step
    if state.switch is not None and phase_at(config, state, step) == "cooldown":
        start = int(cooldown_begin(config, state.switch))
        done = cooldown_progress(config, start, step)
        config = replace(config, replanned_at=step, replanned_progress=done)
    return replace(
        _warmed_up_by(config, start),
        total_steps=total,
        immediate_cooldown=False,
        cooldown_start=start,
        cooldown_fraction=(total - start) / total,
        **_NO_BUDGET,
    )


def curtailed(config: Config, state: State, step: int, used: float) -> Config:
    """The plan of a run that cools down from `step` on, having `used` so much of its budget: the same share of a shorter run."""
    part = config.cooldown_fraction
    if config.budget is None:
        return cooled(config, state, step, max(1, int(min(round(part / (1 - part) * step), config.end - step))))
    budget, total = config.budget
    shorter = used / (1 - part)
    less: dict[str, Any] = {budget: min(total, shorter if budget == "total_seconds" else math.floor(shorter))}
    return replace(config, **less)


def _warmed_up_by(config: Config, step: int) -> Config:
    """The plan of a run whose warm-up is at its limit by `step`, 1 or more."""
    origin = min(config.warmup_origin, step - 1)
    return replace(config, warmup_origin=origin, warmup_limit=min(config.warmup_limit, step - origin))


def opened(config: Config, step: int) -> Config:
    """The plan of a run that goes on from `step` without an end.

    Raises:
        ValueError: for one whose cooldown is immediate, and knows nothing else.
    """
    if config.immediate_cooldown:
        raise ValueError("total_steps=None: a run with immediate_cooldown=True needs an end; give it a later one")
    origin = min(config.warmup_origin, step)  # a warm-up that waits for its length begins
    return replace(config, total_steps=None, cooldown_start=None, warmup_origin=origin, **_NOT_REPLANNED, **_NO_BUDGET)


def longer(config: Config, state: State, step: int, total_epochs: int | None, total_steps: int | None) -> Config:
    """The plan of a run at `step` that is to have as many epochs, or steps, in all; with neither its end is open.

    The cooldown begins, or begins anew, where the last `cooldown_fraction` does, but not before `step` unless it has begun.

    Raises:
        ValueError: naming the argument, if the run has no epochs or is as long already.
    """
    total, given = total_steps, f"total_steps={total_steps!r}"
    if total_epochs is not None:
        given = f"total_epochs={total_epochs!r}"
        if config.steps_per_epoch is None:
            raise ValueError(f"{given}: the run was given no epochs; give total_steps")
        total = config.steps_per_epoch * total_epochs
    if total is None:
        return opened(config, step)
    least = max(config.total_steps or 0, step + 1)
    if total <= least:
        raise ValueError(f"{given}: must be more than {least} steps, has {total}; the run is at step {step}")
    phase = phase_at(config, state, step)
    earliest = {"warmup": step + 1, "stable": step}.get(phase, 0)
    config = replace(lengthened(config, total, earliest), warmup_origin=min(config.warmup_origin, step), **_NO_BUDGET)
    if phase != "warmup" or config.immediate_cooldown:
        return config
    assert config.cooldown_start is not None
    return replace(config, warmup_limit=min(config.warmup_limit, config.cooldown_start - config.warmup_origin))


def rewarmed(config: Config, state: State, step: int, fraction: float) -> Config:
    """The plan of a run that begins its warm-up anew at `step`, from a `fraction` of the LR that it has there.

    The LR grows at the pace of the end of the first warm-up, up to the same `max_lr`, or a higher one where batches
    have grown since; of several optimizers the one that has
    furthest to go does, the others come to theirs at the same step.

    Raises:
        TypeError, ValueError: unless the fraction is above 0 and below 1, and the run in its stable phase.
    """
    share = fraction_of("fraction", fraction)
    if (phase := phase_at(config, state, step)) != "stable":
        cure = {"warmup": "its search is still going on"}.get(phase, "make it longer first, with extend")
        raise ValueError(f"fraction={fraction!r}: a warm-up begins anew in the stable phase, the run is in {phase!r}; {cure}")
    lows, needed = [share * lr for lr in each_lr(all_lrs(config, state, step))], []
    more = max(1.0, state.batch_factor)  # larger batches bear higher LRs
    for one, low in zip(each_config(config), lows, strict=True):
        pace = one.decades or math.log10(one.max_lr / one.min_lr)
        needed.append(max(1, round(config.warmup_steps * math.log10(more * one.max_lr / low) / pace)))
    steps = max(needed)
    limit = int(min(steps, config.cooldown_from - step))
    others = tuple((low, more * high, factor) for low, (_, high, factor) in zip(lows[1:], config.others, strict=True))
    plan: dict[str, Any] = {"warmup_type": "exp", "warmup_steps": steps, "warmup_limit": limit, "warmup_origin": step}
    return replace(config, min_lr=lows[0], max_lr=more * config.max_lr, others=others, **plan)


def widened(config: Config, peak_factor: float | None, optimizer: Optimizer, factor: float) -> Config:
    """The plan of a run, in its first step, whose LR range reaches lower, or higher, by a `factor`.

    Args:
        peak_factor: the argument.
    """
    after = replace(config, min_lr=config.min_lr * min(1.0, factor), max_lr=config.max_lr * max(1.0, factor))
    if peak_factor is not None:
        return after
    was, lagging = (lag_share(optimizer, one.min_lr, one.max_lr, one.warmup_type, one.warmup_steps) for one in (config, after))
    return replace(after, peak_factor=config.peak_factor * lagging / was)


def measured(config: Config, given: Mapping[str, Any], optimizer: Optimizer, total: float, step: int) -> Config:
    """The plan of a run that turns out to have about `total` steps: its warm-up, as one of that length would have it.

    Args:
        given: the arguments `max_warmup_fraction`, `test_interval` and `peak_factor`.
        step: optimizer steps taken; the last of them, at `min_lr`, is the first of the axis.
    """
    steps = max(1, int(min(warmup_share(given["max_warmup_fraction"], total) * total, _FARTHEST)))
    low, high = zip(*((one.min_lr, one.max_lr) for one in each_config(config)), strict=True)
    arguments = {**vars(config), **given, **_NO_BUDGET, "optimizer": optimizer, "total_epochs": None, "max_warmup_steps": steps}
    arguments |= {"min_lr": low, "max_lr": high}
    like = configure(arguments | {"total_steps": None}, total)
    names = ("warmup_steps", "warmup_limit", "test_interval", "peak_factor", "others")
    return replace(config, warmup_origin=step - 1, **{name: getattr(like, name) for name in names})


def larger(config: Config, used: float, budget: str, total: float) -> Config:
    """The plan of a run with more of its budget; the cooldown is planned anew, by :func:`spent`.

    Raises:
        ValueError: naming the argument, for a budget that the run has not, or that is no larger.
    """
    if config.budget is None or config.budget[0] != budget:
        raise ValueError(f"{budget}={total!r}: the run has no such budget; give the scheduler one, or extend by total_steps")
    least = max(config.budget[1], used)
    if total <= least:
        raise ValueError(f"{budget}={total!r}: must be more than {least:g}, of which {used:g} are used")
    return replace(config, **{**_NOT_REPLANNED, budget: total})


def spent(config: Config, state: State, step: int, used: float, a_step: float) -> Config:
    """The plan of a run at `step` that has `used` so much of its budget, where a step uses `a_step`.

    The cooldown follows what is used, not the steps: it is always as far as the budget. Where nothing is left the run is over.
    """
    assert config.budget is not None
    budget, total = config.budget
    length, left = config.cooldown_fraction * total, total - used
    if left > length:
        return config if config.total_steps is None else replace(config, total_steps=None, cooldown_start=None, **_NOT_REPLANNED)
    start = step if config.cooldown_start is None else config.cooldown_start
    if start < step and left < max(_LEAST[budget] * a_step, math.ulp(total)):
        return replace(config, total_steps=step)
    steps = max(1, math.ceil(min(left / a_step, _FARTHEST))) if a_step else _FARTHEST
    latest = max(0.0, 1 - 0.25 * a_step / length)  # the last step trains, too
    return replace(
        _warmed_up_by(config, start),
        total_steps=step + steps,
        cooldown_start=start,
        replanned_at=step,
        replanned_progress=max(config.replanned_progress, min(1 - left / length, latest)),
    )
