"""State: what a run has used of a budget of samples, tokens or seconds, by what its ranks have told each other."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any, Final

import numpy as np

from autowu.config import Config
from autowu.ranks import Ranks

__all__ = ["GIVEN", "MEASURED", "Budget"]

GIVEN: Final = ("max_warmup_fraction", "test_interval", "peak_factor")
"""Arguments by which a warm-up is planned."""

MEASURED: Final = 10
"""Steps by which it is told what a step uses: the median of as many, which no pause for an evaluation moves."""


class Budget:
    """Counts what steps use. The clock runs from the end of the first step that this process takes; that step is not counted.

    Attributes:
        used: by all ranks so far; seconds in the mean over the ranks.
        own: by this rank, since it told the others.
        given: arguments by which the warm-up is planned once it is known what a step uses; None where it is planned already.
        over: whether nothing is left for another step.
    """

    def __init__(self, config: Config, arguments: Mapping[str, Any], ranks: Ranks) -> None:
        self.used, self.own, self.over = 0.0, 0.0, False
        self.given: dict[str, Any] | None = None
        if config.budget and arguments["max_warmup_steps"] is None:
            self.given = {name: arguments[name] for name in GIVEN}
        self._recent: list[float] = []
        self._since: float | None = None  # when the clock was read last
        self._pauses = 0  # within so many it stands still
        self._ranks = ranks

    def of_step(self, config: Config, samples: Any, tokens: Any) -> float:
        """What the step that is over has used, by its arguments or by the clock.

        Raises:
            TypeError, ValueError: if it is not said, or is no count.
        """
        budget = None if self.over else config.budget
        if budget is None and samples is None and tokens is None:  # as a rule
            return 0.0
        counts = {"total_samples": ("samples", samples), "total_tokens": ("tokens", tokens)}
        for name, value in counts.values():
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
                raise TypeError(f"{name}={value!r}: must be an integer, at least 0")
            if value is not None and value < 0:
                raise ValueError(f"{name}={value!r}: must be at least 0")
        if budget is None:
            return 0.0
        if budget[0] == "total_seconds":
            return self._tick()
        name, value = counts[budget[0]]
        if value is None:
            cure = f"pass with every step the {name} that it took, on each rank its own"
            raise TypeError(f"{name}=None: must be an integer, at least 0, in a run with {budget[0]}={budget[1]}; {cure}")
        return float(value)

    def _tick(self) -> float:
        """Seconds since the clock was read last; 0 the first time, and while it stands still."""
        if self._pauses:
            return 0.0
        now = monotonic()
        before, self._since = self._since, now
        return 0.0 if before is None else now - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Have the clock stand still."""
        ran = self._since is not None
        self.own += self._tick()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._since = monotonic() if ran else None

    def told(self, config: Config) -> float:
        """What this rank has to say: what it has used since it said so last. A mean over the ranks is a sum of shares."""
        own, self.own = self.own, 0.0
        return own / self._ranks.size if config.total_seconds is not None else own

    def hear(self, spent: float) -> None:
        """Take what all ranks have used in a step; nothing in the first one that a clock has not seen begin."""
        self.used += spent
        if spent:
            self._recent = [*self._recent, spent][-MEASURED:]

    @property
    def measured(self) -> bool:
        """Whether it is known what a step uses."""
        return len(self._recent) == MEASURED

    @property
    def a_step(self) -> float:
        """What a step uses: the median of the last ones; 0 as long as none has used anything."""
        return float(np.median(self._recent)) if self._recent else 0.0

    @property
    def used_now(self) -> float:
        """What is used by now: of several ranks the last step is not known yet."""
        return self.used if self._ranks.alone else self.used + self.a_step

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_since": None, "_pauses": 0}  # another process has another clock

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("used", "own", "over", "given")} | {"recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.used, self.own, self.over, self.given = (state[name] for name in ("used", "own", "over", "given"))
        self._recent, self._since = list(state["recent"]), None
