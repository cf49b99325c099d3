"""State: when the run ends. It has heard what this rank was asked for, and what the others were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autowu.checks import count, share
from autowu.config import Config
from autowu.events import EventLog
from autowu.phases import State, phase_at
from autowu.plans import cooled
from autowu.ranks import Ranks
from autowu.reader import LateRead

__all__ = ["Horizon"]


class Horizon:
    """Moves the end of a run: to where a cooldown that was asked for leads.

    Of several ranks those of a run that began without a length tell each other, in a collective a step, what they were asked for.
    It is read a step later, when it has arrived, so that nothing waits.

    Attributes:
        moved: whether the end is where it was asked to be, and not where the arguments of any scheduler say.
    """

    def __init__(self, config: Config, ranks: Ranks, log: EventLog) -> None:
        self._asked: list[int] = []  # steps of cooldown; a list, which a signal handler may add to at any time
        self._pending: LateRead | None = None  # what the ranks said in the last step
        self._opened = config.total_steps is None  # whether they listen to each other
        self.moved = False
        self._ranks, self._log = ranks, log

    def ask(self, taken: int, steps: int | None, fraction: float | None) -> None:
        """Note that a cooldown of `steps`, or of a `fraction` of the steps `taken`, is wanted.

        Raises:
            TypeError, ValueError: unless one of the two is given, in its range.
        """
        if (steps is None) == (fraction is None):
            raise TypeError(
                f"steps={steps!r}, fraction={fraction!r}: give one, steps of 1 or more or a fraction above 0 and at most 1"
            )
        wanted = count("steps", steps) if fraction is None else max(1, round(share("fraction", fraction) * taken))
        self._asked.append(wanted)

    def extended(self, is_open: bool) -> None:
        """Note that the run was made longer; what was asked for is forgotten."""
        self._asked.clear()
        self.moved, self._opened = False, self._opened or is_open

    def after_step(self, config: Config, state: State, step: int) -> Config:
        """The plan after `step` steps, the same on all ranks."""
        if not self._asked and not self._opened:  # as a rule
            return config
        phase = phase_at(config, state, step)
        if phase == "done":  # for all ranks alike
            self._asked.clear()
            return config
        asked = self._heard()
        if not asked or (phase == "cooldown" and step + asked >= config.end):
            return config
        steps = int(min(asked, config.end - step))
        self.moved = True
        self._log.tell("cooldown", step, f"AutoWU cools down from step {step} on, over {steps} steps")
        return cooled(config, state, step, steps)

    def _heard(self) -> int:
        """Steps of cooldown that the ranks were asked for, in the mean; 0 for none."""
        own = 0
        while self._asked:
            own = self._asked.pop(0)
        if self._ranks.alone or not self._opened:
            return own
        before, said = self._pending, torch.tensor([float(own > 0), float(own)], dtype=torch.float64)
        self._pending = LateRead(self._ranks.sum(said))
        number, total = (0.0, 0.0) if before is None else before.get()
        return round(total / number) if number else 0

    def state_dict(self) -> dict[str, Any]:
        pending = None if self._pending is None else self._pending.get()
        return {"asked": list(self._asked), "pending": pending, "opened": self._opened, "moved": self.moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._asked, pending = list(state["asked"]), state["pending"]
        self._opened, self.moved = state["opened"], state["moved"]
        self._pending = None if pending is None else LateRead(torch.tensor(pending, dtype=torch.float64))
