"""Pure: the plan of a run that is changed on the way, from one configuration to the next."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from autowu.checks import fraction as fraction_of
from autowu.config import Config, lengthened
from autowu.phases import State, base_lr, cooldown_begin, cooldown_progress, phase_at
from autowu.schedules import decades

__all__ = ["cooled", "longer", "opened", "rewarmed"]

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
    )


def _warmed_up_by(config: Config, step: int) -> Config:
    """The plan of a run whose warm-up is at its limit by `step`, 1 or more."""
    origin = min(config.warmup_origin, step - 1)
    return replace(config, warmup_origin=origin, warmup_limit=min(config.warmup_limit, step - origin))


def opened(config: Config) -> Config:
    """The plan of a run that goes on without an end.

    Raises:
        ValueError: for one whose cooldown is immediate, and knows nothing else.
    """
    if config.immediate_cooldown:
        raise ValueError("total_steps=None: a run with immediate_cooldown=True needs an end; give it a later one")
    return replace(config, total_steps=None, cooldown_start=None, **_NOT_REPLANNED)


def longer(config: Config, state: State, step: int, total_epochs: int | None, total_steps: int | None) -> Config:
    """The plan of a run at `step` that is to have as many epochs, or steps, in all; with neither its end is open.

    The cooldown begins, or begins anew, where the last `cooldown_fraction` does, but not before `step` unless it has begun.

    Raises:
        ValueError: naming the argument, if the run has no epochs or is as long already.
    """
    total, given = total_steps, f"total_steps={total_steps!r}"
    if total_epochs is not None:
        given = f"total_epochs={total_epochs!r}"
        if total_steps is not None:
            raise ValueError(f"{given}, total_steps={total_steps!r}: give one length, or none to leave the end open")
        if config.steps_per_epoch is None:
            raise ValueError(f"{given}: the run was given no epochs; give total_steps")
        total = config.steps_per_epoch * total_epochs
    if total is None:
        return opened(config)
    least = max(config.total_steps or 0, step + 1)
    if total <= least:
        raise ValueError(f"{given}: must be more than {least} steps, has {total}; the run is at step {step}")
    phase = phase_at(config, state, step)
    earliest = {"warmup": step + 1, "stable": step}.get(phase, 0)
    config = lengthened(config, total, earliest)
    if phase != "warmup" or config.immediate_cooldown:
        return config
    assert config.cooldown_start is not None
    return replace(config, warmup_limit=min(config.warmup_limit, config.cooldown_start - config.warmup_origin))


def rewarmed(config: Config, state: State, step: int, fraction: float) -> Config:
    """The plan of a run that begins its warm-up anew at `step`, from a `fraction` of the LR that it has there.

    The LR grows at the pace of the end of the first warm-up, up to the same `max_lr`.

    Raises:
        TypeError, ValueError: unless the fraction is above 0 and below 1, and the run in its stable phase.
    """
    low = fraction_of("fraction", fraction) * base_lr(config, state, step)
    if (phase := phase_at(config, state, step)) != "stable":
        cure = {"warmup": "its search is still going on"}.get(phase, "make it longer first, with extend")
        raise ValueError(f"fraction={fraction!r}: a warm-up begins anew in the stable phase, the run is in {phase!r}; {cure}")
    pace = decades(config.min_lr, config.max_lr, config.warmup_type) or math.log10(config.max_lr / config.min_lr)
    steps = max(1, round(config.warmup_steps * math.log10(config.max_lr / low) / pace))
    limit = int(min(steps, config.cooldown_from - step))
    return replace(config, min_lr=low, warmup_type="exp", warmup_steps=steps, warmup_limit=limit, warmup_origin=step)
