"""State: what a figure needs and nothing else keeps: the tests, and the courses that the LR took before the present one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from autowu.config import Config
from autowu.phases import RampPlan, State, Verdict, ramp_of

__all__ = ["MOST", "Course", "Record", "Test"]

MOST: Final = 400
"""Tests, and courses, that are kept at most."""

T = TypeVar("T")


@dataclass(frozen=True)
class Test:
    """A test that had a verdict.

    Attributes:
        step: optimizer steps taken by then; of several ranks the verdict is on the losses of one interval less.
        votes: in a row, this one included.
        probability: of the minimum being past, in [0, 1].
    """

    __test__ = False  # pytest's, of classes of this name

    step: int
    votes: int
    probability: float


@dataclass(frozen=True)
class Course:
    """What the LR after the switch followed before step `until`, where that has changed since.

    Attributes:
        total_steps, cooldown_start: those of the configuration, before the run was extended.
        factor: on the peak LR, by setbacks, the plateau rule, the batch size and ramps, above 0.
        ramp: the ramp that was under way, None for none.
        immediate: whether the cooldown was; None for as it is now, of states that do not say.
    """

    until: int
    total_steps: int | None
    cooldown_start: int | None
    factor: float
    ramp: RampPlan | None = None
    immediate: bool | None = None


class Record:
    """Tests and courses in order, on all ranks alike. It costs a step nothing, and its size is bounded."""

    def __init__(self) -> None:
        self.tests: list[Test] = []
        self.courses: list[Course] = []

    def test(self, step: int, verdict: Verdict) -> None:
        """Keep what a test at `step` found."""
        self.tests.append(Test(step, verdict.votes, verdict.probability))
        _thin(self.tests)

    def steer(self, step: int, config: Config, state: State, to: Config, after: State) -> None:
        """Keep the course before `step`, where that of `to` and `after` from there on is another."""
        course = _course(step, config, state)
        if state.switch is not None and course != _course(step, to, after):
            self.courses.append(course)
            _thin(self.courses)

    def state_dict(self) -> dict[str, Any]:
        return {"tests": [asdict(test) for test in self.tests], "courses": [asdict(course) for course in self.courses]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tests = [Test(**test) for test in state["tests"]]
        self.courses = [Course(**{**course, "ramp": ramp_of(course.get("ramp"))}) for course in state["courses"]]


def _course(step: int, config: Config, state: State) -> Course:
    plan = config.total_steps, config.cooldown_start
    return Course(step, *plan, float(state.factor), state.ramp, config.immediate_cooldown)


def _thin(kept: list[T]) -> None:
    """Of too many drop every second of the older half: the latest are all there, and the first is."""
    if len(kept) > MOST:
        del kept[1 : MOST // 2 : 2]
