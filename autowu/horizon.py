"""State: when the run ends. It has heard what this rank was asked for, and what the others were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from autowu.budget import Budget
from autowu.checks import count, fraction, share
from autowu.config import ARGUMENTS, BUDGETS, Config, forked
from autowu.events import EventLog, end_message
from autowu.phases import State, phase_at
from autowu.plans import cooled, curtailed, larger, longer, measured, spent
from autowu.ranks import Ranks
from autowu.reader import LateRead

__all__ = ["Horizon"]

_LEFT_OVER: Final = 100, 0.1
"""Steps past the end of a run that nobody is told of, and their share of it: as many as either, where it was counted roughly."""


class Horizon:
    """Moves the end of a run: to where a cooldown that was asked for leads, or to where its budget is used.

    Of several ranks those of a run that began without a number of steps tell each other, in a collective a step, what they were
    asked for and what they have used. It is read a step later, when it has arrived, so that nothing waits.

    Attributes:
        budget: what is used of the budget.
        moved: whether the end is where it was asked to be, and not where the arguments of any scheduler say.
    """

    def __init__(self, config: Config, arguments: Mapping[str, Any], ranks: Ranks, log: EventLog) -> None:
        self.budget = Budget(config, arguments, ranks)
        self.moved = False
        self._asked: list[int] = []  # steps of cooldown; a list, which a signal handler may add to at any time
        self._pending: LateRead | None = None  # what the ranks said in the last step
        self._opened = config.total_steps is None  # whether they listen to each other
        self._optimizer, self._ranks, self._log = arguments["optimizer"], ranks, log

    def ask(self, taken: int, steps: int | None, part: float | None) -> None:
        """Note that a cooldown of `steps`, or of a `part` of the steps `taken`, is wanted.

        Raises:
            TypeError, ValueError: unless one of the two is given, in its range.
        """
        if (steps is None) == (part is None):
            raise TypeError(f"steps={steps!r}, fraction={part!r}: give one, steps of 1 or more or a fraction above 0 and at most 1")
        wanted = count("steps", steps) if part is None else max(1, round(share("fraction", part) * taken))
        self._asked.append(wanted)

    def longer(self, config: Config, state: State, step: int, lengths: Mapping[str, Any]) -> Config:
        """The plan of a run that is to have as many epochs or steps in all, or so much of its budget; with none its end is open.

        Raises:
            TypeError, ValueError: naming the argument, its value and its range.
        """
        given = {name: ARGUMENTS[name](name, value) for name, value in lengths.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{', '.join(f'{k}={v!r}' for k, v in given.items())}: give one length, or none to leave the end open")
        budget = next((name for name in BUDGETS if name in given), None)
        if budget is None:
            config = longer(config, state, step, given.get("total_epochs"), given.get("total_steps"))
        else:
            config = larger(config, self.budget.used_now, budget, given[budget])
            self.budget.over = False
            config = spent(config, state, step, self.budget.used_now, self.budget.a_step)
        self._asked.clear()
        self.moved, self._opened = False, self._opened or config.total_steps is None
        return config

    def branch(
        self, config: Config, state: State, step: int, progress: float, cooldown_fraction: float | None, steps: int | None
    ) -> tuple[Config, dict[str, Any]]:
        """The plan of a branch with a cooldown of its own, and what is to be saved of this object for it.

        Raises:
            TypeError, ValueError: naming the argument, its value and its range.
        """
        if (steps is None) == (cooldown_fraction is None):
            given = f"cooldown_fraction={cooldown_fraction!r}, steps={steps!r}"
            raise TypeError(f"{given}: give one, a fraction above 0 and below 1 or steps of 1 or more")
        if cooldown_fraction is not None:
            if config.budget is not None or config.total_steps is not None:
                return forked(config, step, cooldown_fraction, progress), self.state_dict()
            part = fraction("cooldown_fraction", cooldown_fraction)
            steps = max(1, round(part / (1 - part) * step))
        steps, phase = count("steps", steps), phase_at(config, state, step)
        if phase not in ("stable", "cooldown"):
            raise ValueError(f"steps={steps!r}: a branch cools down from the stable phase or the cooldown, the run is in {phase!r}")
        return cooled(config, state, step, steps), self.state_dict() | {"asked": [], "moved": True}

    def after_step(self, config: Config, state: State, step: int) -> Config:
        """The plan after `step` steps, the same on all ranks."""
        settled = state.settled and not self.moved
        if not self._asked and not self._opened and not settled:  # as a rule
            if step > (config.total_steps or step):
                self._tell_of_the_end(config, state, step)
            return config
        phase = phase_at(config, state, step)
        if phase == "done" and (config.budget is None or self.budget.over):  # for all ranks alike
            self._asked.clear()
            self._tell_of_the_end(config, state, step)
            return config
        asked, used = self._heard(config)
        if config.budget is not None:
            self.budget.hear(used)
        if settled and phase == "stable":
            config = self._curtailed(config, state, step)
            phase = phase_at(config, state, step)
        if config.budget is not None:
            config = self._by_budget(config, state, step)
            phase = phase_at(config, state, step)
        if not asked or phase == "done" or (phase == "cooldown" and step + asked >= config.end):
            return config
        steps = int(min(asked, config.end - step))
        self.moved = True
        self._log.tell("cooldown", step, f"AutoWU cools down from step {step} on, over {steps} steps")
        return cooled(config, state, step, steps)

    def _tell_of_the_end(self, config: Config, state: State, step: int) -> None:
        """Warn of steps past the end of a run that has a number of steps, once they are many."""
        total, (least, part) = config.total_steps, _LEFT_OVER
        if total is not None and config.budget is None and step == total + 1 + max(least, int(part * total)):
            self._log.warn("end", step, end_message(config, state))

    def _curtailed(self, config: Config, state: State, step: int) -> Config:
        """The plan of a run whose loss has stopped improving."""
        self.moved = True
        config = curtailed(config, state, step, self.budget.used_now)
        length = f"{config.end - step} steps"
        if config.budget is not None:
            length = f"the rest of {config.budget[0]}={config.budget[1]:g}"
        message = f"AutoWU cools down from step {step} on, over {length}: the loss has stopped improving"
        self._log.tell("cooldown", step, message)
        return config

    def _by_budget(self, config: Config, state: State, step: int) -> Config:
        """The plan of a run with a budget, by what is used of it."""
        assert config.budget is not None
        budget, total = self.budget, config.budget[1]
        if state.switch is not None:
            budget.given = None
        elif budget.given is not None and budget.measured:
            steps = step + (total - budget.used_now) / budget.a_step
            config, budget.given = measured(config, budget.given, self._optimizer, steps, step), None
            self._log.warn_of_a_short_run(config)
        config = spent(config, state, step, budget.used_now, budget.a_step)
        budget.over = step >= config.end
        return config

    def _heard(self, config: Config) -> tuple[int, float]:
        """Steps of cooldown that the ranks were asked for, in the mean, 0 for none; and what they have used of the budget."""
        own, used = 0, self.budget.told(config)
        while self._asked:
            own = self._asked.pop(0)
        before, self._pending = self._pending, None
        number, asked, spent = (0.0, 0.0, 0.0) if before is None else before.get()
        wanted = round(asked / number) if number else 0
        if self._ranks.alone or not self._opened:  # several may have been there before, and have said something last
            return own or wanted, used + spent
        self._pending = LateRead(self._ranks.sum(torch.tensor([float(own > 0), float(own), used], dtype=torch.float64)))
        return wanted, spent

    def state_dict(self) -> dict[str, Any]:
        pending = None if self._pending is None else self._pending.get()
        return {
            "asked": list(self._asked),
            "pending": pending,
            "opened": self._opened,
            "moved": self.moved,
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._asked, pending = list(state["asked"]), state["pending"]
        self._opened, self.moved = state["opened"], state["moved"]
        self.budget.load_state_dict(state["budget"])
        self._pending = None if pending is None else LateRead(torch.tensor(pending, dtype=torch.float64))
