"""Pure: the plan of a run that is changed on the way, from one configuration to the next."""

from __future__ import annotations

from dataclasses import replace

from autowu.config import Config
from autowu.phases import State, cooldown_begin, cooldown_progress, phase_at

__all__ = ["cooled"]


def cooled(config: Config, state: State, step: int, steps: int) -> Config:
    """The plan of a run that is over after `steps` more steps, the cooldown beginning, or going on, at `step`.

    It is that of a run which had this length, and this cooldown, from the start. Before the switch the warm-up is at its limit.
    """
    total, start = step + steps, step
    if state.switch is not None and phase_at(config, state, step) == "cooldown":
        start = int(cooldown_begin(config, state.switch))
        done = cooldown_progress(config, start, step)
        config = replace(config, replanned_at=step, replanned_progress=done)
    origin = min(config.warmup_origin, step - 1)
    return replace(
        config,
        total_steps=total,
        immediate_cooldown=False,
        cooldown_start=start,
        cooldown_fraction=(total - start) / total,
        warmup_origin=origin,
        warmup_limit=min(config.warmup_limit, start - origin),
    )
