"""Pure: what the state of a run tells of it, for figures, tables and programs. Needs no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autowu.config import UNMEASURED, Config
from autowu.events import back_at, in_words
from autowu.gp import FloatArray
from autowu.history import LossHistory
from autowu.phases import (
    Event,
    State,
    all_lrs,
    cooldown_begin,
    each_config,
    each_lr,
    most_setbacks,
    phase_at,
    state_of,
    warmup_lr_at,
)
from autowu.record import Course, Record, Test
from autowu.states import readable

__all__ = ["Band", "Report"]


@dataclass(frozen=True)
class Band:
    """The noise-free loss curve as the last test saw it.

    Attributes:
        steps: (G,) of the optimizer, fractional.
        mean, std: (G,) in units of the loss; over several fits those of their mixture.
    """

    steps: FloatArray
    mean: FloatArray
    std: FloatArray


@dataclass(frozen=True)
class Report:
    """A run, as it stands.

    Attributes:
        config, state, events: as in the run.
        step: optimizer steps taken.
        tests, courses: as :class:`~autowu.record.Record` keeps them.
        loss_steps, losses: (n,) each, the losses and the steps they are of; of a long run means over successive steps.
        band: None before the first test, and on all ranks but the first.
    """

    config: Config
    state: State
    step: int
    events: tuple[Event, ...]
    tests: tuple[Test, ...]
    courses: tuple[Course, ...]
    loss_steps: FloatArray
    losses: FloatArray
    band: Band | None

    @classmethod
    def of(cls, state: Any) -> Report:
        """The report of a saved state of any version that is read.

        Raises:
            TypeError, ValueError: in one line, if it is none, incomplete or damaged.
        """
        name = state.get("class") if isinstance(state, Mapping) else ""
        return cls.of_parts(readable(state, name if isinstance(name, str) else ""))

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any]) -> Report:
        """The report of a state of the present version, of which the copies, say, may be left out."""
        config, record = Config(**parts["config"]), Record()
        record.load_state_dict(parts["record"])
        step, posterior, after = parts["last_epoch"], parts["judge"]["posterior"], parts["stage"].get("losses")
        origin = 0 if config.warmup_origin == UNMEASURED else config.warmup_origin
        curves = [_points(parts["judge"]["history"], origin)]
        if after is not None:
            curves.append(_points(after, step - after["steps"]))
        band = None
        if posterior is not None:
            grid, means, variances = (np.asarray(posterior[key].cpu()) for key in ("grid", "mean", "variance"))
            variance = np.maximum(variances.mean(0) + means.var(0), 0)
            band = Band(origin + grid * config.warmup_steps, means.mean(0), np.sqrt(variance))
        loss_steps, losses = (np.concatenate(arrays) for arrays in zip(*curves, strict=True))
        events = tuple(Event(**event) for event in parts["events"])
        told = (config, state_of(parts["state"]), step, events, tuple(record.tests), tuple(record.courses))
        return cls(*told, loss_steps, losses, band)

    def lr(self, step: int) -> float:
        """LR of optimizer step `step`, as it was or, after the present, will be: of the parameter group with the largest LR.

        Of several optimizers that of the first; :meth:`lrs` has all.
        """
        return self.lrs(step)[0]

    def lrs(self, step: int) -> tuple[float, ...]:
        """The same of each optimizer."""
        for course in self.courses:
            if step < course.until:
                config = replace(self.config, total_steps=course.total_steps, cooldown_start=course.cooldown_start)
                if course.immediate is not None:
                    config = replace(config, immediate_cooldown=course.immediate)
                if config.budget is None:  # what was planned anew was so later, as a rule
                    config = replace(config, replanned_at=None, replanned_progress=0.0)
                state = State(switch=self.state.switch, plateau_factor=course.factor, ramp=course.ramp)
                return each_lr(all_lrs(config, state, step))
        return each_lr(all_lrs(self.config, self.state, step))

    @property
    def begun(self) -> int:
        """Step at which the warm-up began, the last where it was begun anew: of the LRs before it nothing is known any longer."""
        return max((event.step for event in self.events if event.kind == "rewarm"), default=0)

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """First step and end of each phase, so far as it is known and has steps."""
        config, switch = self.config, self.state.switch
        if switch is None:
            return {"warm-up": (self.begun, self.step)}
        end = max(self.step, switch.step) if config.total_steps is None else config.total_steps
        start = int(min(cooldown_begin(config, switch), end))
        all_three = {"warm-up": (self.begun, switch.step), "stable": (switch.step, start), "cooldown": (start, end)}
        return {name: span for name, span in all_three.items() if span[0] < span[1]}

    @property
    def returns(self) -> list[tuple[int, int]]:
        """Each time that the run went back: at which step, to the copy of which step."""
        found = [(event.step, back_at(event)) for event in self.events]
        return [(step, to) for step, to in found if to is not None]

    @property
    def lr_at_minimum(self) -> float | None:
        """LR of the warm-up where the fitted curve was lowest; None where it is not known. Of several optimizers of the first."""
        return next(iter(self.lrs_at_minimum), None)

    @property
    def lrs_at_minimum(self) -> tuple[float, ...]:
        """The same of each optimizer; none where it is not known."""
        switch = self.state.switch
        if switch is None or switch.minimum is None:
            return ()
        place = switch.minimum - self.config.warmup_origin
        return tuple(warmup_lr_at(one, place) for one in each_config(self.config))

    def decided(self) -> list[tuple[str, str]]:
        """What was decided, as rows of a table: what, and the words."""
        config, state, switch = self.config, self.state, self.state.switch
        end = "" if config.total_steps is None else f" of {config.total_steps}"
        phase = phase_at(config, state, self.step).replace("warmup", "warm-up")
        rows = [("phase", f"{phase}, step {self.step}{end}"), ("LR", in_words(self.lrs(self.step)))]
        if switch is None:
            limit = f"by step {config.warmup_origin + config.warmup_limit} at the latest"
            if config.warmup_origin == UNMEASURED:
                limit = "its limit is known once a few steps have told what a step uses of the budget"
            rows.append(("switch", f"not yet; {limit}"))
            if self.tests:
                last = self.tests[-1]
                votes = f"probability {last.probability:.3f} of the minimum being past, {last.votes} of {config.patience} votes"
                rows.append(("last test", f"step {last.step}: {votes}"))
        else:
            rows.append(("switch", f"step {switch.step}{'' if switch.by_test else ', not by test'}"))
            if switch.minimum is not None and switch.probability is not None:
                lowest = f"step {switch.minimum:.0f}, LR {in_words(self.lrs_at_minimum)}"
                rows.append(("minimum", f"{lowest}; past with probability {switch.probability:.3f}"))
            rows.append(("peak LR", in_words(switch.lrs)))
            if state.setbacks:
                rows.append(("setbacks", f"{state.setbacks} of {most_setbacks(state)}"))
        rows += [("went back", f"at step {step}, to the copy of step {to}") for step, to in self.returns]
        rows += [(event.kind, f"step {event.step}: {event.message}") for event in self.events if event.kind != "switch"]
        return rows


def _points(history: Mapping[str, Any], first: int) -> tuple[FloatArray, FloatArray]:
    """Steps and mean losses of a saved history that begins at step `first`."""
    positions, means = LossHistory.from_state_dict(dict(history)).curve(1).finite()
    return positions.cpu().numpy() + first, means.cpu().numpy()
