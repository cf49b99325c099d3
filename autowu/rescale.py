"""Pure: a saved state brought to another number of steps per epoch, as another batch size or number of ranks gives it.

Epochs are what the run that was saved and the one that takes it up have in common: whatever is counted in steps keeps its place in
epochs. LRs, shares, probabilities, and what is counted in losses or tests stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from autowu.config import BUDGETS, Config, check_together, cooldown_start
from autowu.history import MISSING, LossHistory
from autowu.switching import MIN_LOSSES

__all__ = ["rescaled"]

_MOST_LOSSES: Final = 2**22
"""Of a warm-up that is brought to other steps: they are laid out one by one."""


class _Epochs(NamedTuple):
    """The steps of an epoch, before and now."""

    before: int
    now: int

    def steps(self, number: int) -> int:
        """So many steps in the new ones, half a step rounded up: whole epochs, and distances of whole epochs, stay whole."""
        return (2 * number * self.now + self.before) // (2 * self.before)

    def place(self, number: int) -> int:
        """The new step in which the middle of step `number` lies, both from 0."""
        return (2 * number + 1) * self.now // (2 * self.before)


def rescaled(state: Mapping[str, Any], planned: Config) -> Mapping[str, Any]:
    """`state`, checked, as one of a run with the steps per epoch of `planned`; itself where that is not clear, or no change.

    It is clear where both were given steps per epoch, the run has whole epochs, and its phases have room in the new steps; also
    not where millions of losses would have to be laid out.
    """
    config, run = state["config"], state["state"]
    before, now = config["steps_per_epoch"], planned.steps_per_epoch
    if before is None or now is None or before == now or not _has_a_fixed_end(state) or config["total_steps"] % before:
        return state
    epochs = _Epochs(before, now)
    if max((steps := state["judge"]["history"]["steps"]), epochs.steps(steps)) > _MOST_LOSSES:
        return state
    of_config = _config(config, epochs)
    try:
        check_together(of_config)
    except ValueError:
        return state
    taken = epochs.steps(state["last_epoch"])
    if run["switch"] is None:
        taken = min(taken, of_config["warmup_limit"] - 1)
    elif state["last_epoch"] < config["total_steps"]:
        taken = min(taken, of_config["total_steps"] - 1)
    return {
        **state,
        "config": of_config,
        "last_epoch": taken,
        "step_count": taken + 1,
        "state": _state(run, epochs, min(taken, of_config["warmup_limit"]), taken),
        "judge": _judge(state["judge"], epochs, taken, of_config["test_interval"]),
        "reader": {**state["reader"], "looked_at": taken},
        "stage": _stage(state["stage"], epochs, taken),
        "snapshot": _copies(state["snapshot"], epochs, taken),
        "record": _record(state["record"], epochs, taken),
        "events": [{**event, "step": min(epochs.steps(event["step"]), taken)} for event in state["events"]],
    }


def _has_a_fixed_end(state: Mapping[str, Any]) -> bool:
    config, horizon = state["config"], state["horizon"]
    planned = config["replanned_at"] is None and not config["warmup_origin"] and all(config[name] is None for name in BUDGETS)
    return config["total_steps"] is not None and planned and not horizon["moved"] and not horizon["asked"]


def _config(config: Mapping[str, Any], epochs: _Epochs) -> dict[str, Any]:
    names = ("total_steps", "warmup_steps", "warmup_limit", "test_interval")
    scaled = {**config, **{name: max(1, epochs.steps(config[name])) for name in names}, "steps_per_epoch": epochs.now}
    scaled["cooldown_start"] = start = cooldown_start(Config(**scaled), config["cooldown_fraction"])
    latest = scaled["total_steps"] - 1 if config["immediate_cooldown"] else start
    return {**scaled, "warmup_limit": min(scaled["warmup_limit"], scaled["warmup_steps"], latest)}


def _state(run: Mapping[str, Any], epochs: _Epochs, latest: int, taken: int) -> dict[str, Any]:
    switch = run["switch"]
    if switch is not None:
        minimum = None if switch["minimum"] is None else switch["minimum"] * epochs.now / epochs.before
        switch = {**switch, "step": min(epochs.steps(switch["step"]), latest), "minimum": minimum}
    counts = {name: min(run[name], taken) for name in ("votes", "bad_epochs", "setbacks")}  # at most one a step
    ramp = run["ramp"] and {**run["ramp"], "begin": min(epochs.steps(run["ramp"]["begin"]), taken), "steps": 1}  # it is over
    return {**run, **counts, "switch": switch, "ramp": ramp}


def _judge(judge: Mapping[str, Any], epochs: _Epochs, taken: int, interval: int) -> dict[str, Any]:
    history = _history(judge["history"], epochs, taken, interval + MIN_LOSSES)
    missing = judge["history"]["steps"] - _number(judge["history"]) - judge["repeated"]
    state = history.state_dict()

    def placed(verdict: Mapping[str, Any]) -> dict[str, Any]:
        return {**verdict, "minimum": verdict["minimum"] * epochs.now / epochs.before}

    verdicts: dict[str, Any] = {which: placed(judge[which]) for which in ("last", "next") if judge[which] is not None}
    verdicts["before"] = [placed(verdict) for verdict in judge["before"]]
    return {**judge, **verdicts, "history": state, "repeated": max(0, history.steps - _number(state) - max(0, missing))}


def _number(history: Mapping[str, Any]) -> int:
    """How many of the losses are finite."""
    return int(LossHistory.from_state_dict(dict(history)).total()[1])


def _history(state: Mapping[str, Any], epochs: _Epochs, taken: int, stage: int = 0) -> LossHistory:
    """The history with each loss at its new step: the mean where several come together, none where none comes.

    A mean over losses of smaller batches is a loss of the larger.
    """
    folded, number = (min(epochs.steps(state[name]), taken) for name in ("folded", "steps"))
    again = LossHistory(state["max_points"], stage)
    losses = _losses(state)
    at = torch.tensor([min(epochs.place(index), max(0, number - 1)) for index in range(len(losses))], dtype=torch.int64)
    finite = losses.isfinite()
    came = finite | (losses != MISSING)
    sums, counts, arrived = (
        torch.zeros(max(1, number), dtype=torch.float64).index_add_(0, at, values)
        for values in (torch.where(finite, losses, 0.0), finite.double(), came.double())
    )
    means = torch.where(counts > 0, sums / counts, torch.where(arrived > 0, math.nan, MISSING))
    for index, loss in enumerate(means[:number].tolist()):
        if index == folded:
            again.fold()
        again.append(loss)
    if folded == number:
        again.fold()
    return again


def _losses(state: Mapping[str, Any]) -> Tensor:
    """One loss for each step; those that were folded together as two values that have their mean and their squares."""
    history, packed = LossHistory.from_state_dict(dict(state)), state["losses"].double()
    folded, width = state["folded"], state["width"]
    bins = -(-folded // width)
    sums, squares, counts = packed[1 : 1 + 3 * bins].view(3, bins)
    mean = sums / counts
    spread = (squares / counts - mean.square()).clamp_(min=0).sqrt() * (counts > 1)
    index, within = torch.arange(folded) // width, torch.arange(folded) % width
    values = packed[0] + mean[index] + spread[index] * (1 - 2 * (within % 2))
    return torch.cat([torch.where(within < counts[index], values, MISSING), history.staged.double()])


def _stage(stage: Mapping[str, Any], epochs: _Epochs, taken: int) -> dict[str, Any]:
    if "losses" not in stage:
        return dict(stage)
    epoch = None if stage["epoch"] is None else _history(stage["epoch"], epochs, taken).state_dict()
    return {**stage, "losses": LossHistory(max_points=2).state_dict(), "epoch": epoch, "plateau": None, "back_at": None}


def _record(record: Mapping[str, Any], epochs: _Epochs, taken: int) -> dict[str, Any]:
    def course(plan: Mapping[str, Any]) -> dict[str, Any]:
        if ramp := plan.get("ramp"):
            begin, steps = min(epochs.steps(ramp["begin"]), taken), max(1, epochs.steps(ramp["steps"]))
            plan = {**plan, "ramp": {**ramp, "begin": begin, "steps": steps}}
        if plan["total_steps"] is None or plan["cooldown_start"] is None:
            return {**plan, "until": min(epochs.steps(plan["until"]), taken)}
        total = max(1, epochs.steps(plan["total_steps"]))
        start = min(epochs.steps(plan["cooldown_start"]), total - 1)
        return {**plan, "until": min(epochs.steps(plan["until"]), taken), "total_steps": total, "cooldown_start": start}

    tests = [{**test, "step": min(epochs.steps(test["step"]), taken)} for test in record["tests"]]
    return {**record, "tests": tests, "courses": [course(plan) for plan in record["courses"]]}


def _copies(copies: Mapping[str, Any] | None, epochs: _Epochs, taken: int) -> dict[str, Any] | None:
    if copies is None:
        return None
    return {
        which: {**saved, "step": min(epochs.steps(saved["step"]), taken)} if which in ("newer", "older") and saved else saved
        for which, saved in copies.items()
    }
