"""Pure: what a saved state may hold, as one table. A state that is damaged is refused before anything is built of it.

A check is given the path of an entry, as ``state_dict["judge"]["history"]``, and its value. What an entry may be alone stands in
the tables; which entries must agree stands in the functions ``_*_agrees``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

import torch
from torch import Tensor

from autowu import checks
from autowu.budget import GIVEN, MEASURED
from autowu.checks import Check, between, count, flag, optional, positive, share
from autowu.config import ARGUMENTS, BUDGETS, Config, check_together
from autowu.gp import MIN_LENGTHSCALE
from autowu.held_out import AVERAGED, MAX_LOWERINGS
from autowu.phases import BEFORE, Event, State
from autowu.ramp import MOST_RAMPS, SPAN
from autowu.record import MOST
from autowu.watch import BLOCK, HUGE, Leaps, LossWatch

__all__ = ["check_state", "group_counts", "shown"]

_LARGEST: Final = 2**53
"""No step, and no count, is larger: beyond it a float does not tell two apart."""
_MOST_POINTS: Final = 2**20
"""Of a history: 25 MB."""
_MOST_SUBSAMPLES: Final = 4096
_LARGEST_LR: Final = 1e18
"""The product of two is still a float32."""
_STAGED: Final = 1024
"""Losses that any history has room for before it folds them, at least."""


def shown(value: Any) -> str:
    """A value in some words of one line, whatever it is."""
    try:
        words = " ".join(reprlib.repr(value).split())
        return words if len(words) <= 80 else f"{words[:77]}..."
    except ValueError:  # an integer of thousands of digits
        return f"({type(value).__name__})"


def _plain(check: Check) -> Check:
    """The check of a plain number or word, of a size that can be named."""

    def run(path: str, value: Any) -> None:
        if not isinstance(value, (bool, int, float, str, type(None))) or (isinstance(value, str) and len(value) > 100):
            raise TypeError(f"{path}={shown(value)}: must be a plain number or word")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"{path}: must be an integer of at most 53 bits, has {value.bit_length()}")
        check(path, value)

    return run


def _whole(least: int, most: int = _LARGEST) -> Check:
    def run(path: str, value: Any) -> None:
        if not least <= checks.integer(path, value) <= most:
            raise ValueError(f"{path}={value!r}: must be an integer from {least} to {most}")

    return _plain(run)


def _anything(path: str, value: Any) -> None:
    """What is not looked into."""


def _text(path: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{path}={shown(value)}: must be a string")


def _mapping(path: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{path}={shown(value)}: must be a dictionary")
    return value


def _record(entries: Mapping[str, Check], more: bool = False, may: Mapping[str, Check] | None = None) -> Check:
    """The check of a dictionary with these entries, those that it `may` have, and no other unless there may be `more`."""
    optional_ones = may or {}

    def run(path: str, value: Any) -> None:
        _mapping(path, value)
        if missing := [key for key in entries if key not in value]:
            others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"{path} without {', '.join(map(repr, missing[:3]))}{others}: the state is incomplete")
        if not more and (unknown := [key for key in value if key not in entries and key not in optional_ones]):
            raise ValueError(f"{path}[{shown(unknown[0])}]: must not be there; known are {', '.join(entries)}")
        for key, check in (*entries.items(), *((key, check) for key, check in optional_ones.items() if key in value)):
            check(f'{path}["{key}"]', value[key])

    return run


def _dict_of(check: Check) -> Check:
    def run(path: str, value: Any) -> None:
        for key, inner in _mapping(path, value).items():
            check(f"{path}[{shown(key)}]", inner)

    return run


_PLACES: Final[Mapping[str, tuple[type | tuple[type, ...], ...]]] = {
    "parameter": ((str, int),),
    "buffer": (str,),
    "extra": (str,),
    "state": (int, (str, int), str),
    "group": (int, int, str),
    "named": (int, (str, int), (str, int, tuple)),
    "shape": (str,),
}
"""What follows in a key of a copy, see :data:`autowu.live.Key`, by its first word."""


def _by_place(check: Check) -> Check:
    """The check of a dictionary with an entry for each place of a run that a copy was made of."""

    def run(path: str, value: Any) -> None:
        for key in _mapping(path, value):
            kinds = _PLACES.get(key[0]) if isinstance(key, tuple) and key and isinstance(key[0], str) else None
            if kinds is None or len(key) != len(kinds) + 1 or not all(map(isinstance, key[1:], kinds)):
                raise ValueError(f"{path}[{shown(key)}]: must be a place, as ('parameter', name) is")
        _dict_of(check)(path, value)

    return run


def _list_of(check: Check, most: int = _LARGEST) -> Check:
    def run(path: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{path}={shown(value)}: must be a list")
        if len(value) > most:
            raise ValueError(f"{path} of {len(value)} entries: must have at most {most}")
        for index, inner in enumerate(value):
            check(f"{path}[{index}]", inner)

    return run


def _each(check: Check) -> Check:
    """The check of a value, or of a list of one for each optimizer."""
    return lambda path, value: (_list_of(check) if isinstance(value, list | tuple) else check)(path, value)


_DTYPES: Final[Mapping[str, tuple[torch.dtype, ...]]] = {
    "": (),  # any
    "float": (torch.float64, torch.float32),
    "int": (torch.int64,),
    "byte": (torch.uint8,),
}


def _tensor(dimensions: int | None = None, kind: str = "") -> Check:
    """The check of a dense tensor, of so many dimensions and of a `kind` of :data:`_DTYPES`."""
    dtypes = _DTYPES[kind]

    def run(path: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{path}={shown(value)}: must be a tensor")
        if value.is_meta or value.layout != torch.strided or value.is_quantized or (dtypes and value.dtype not in dtypes):
            wanted = f" of {' or '.join(map(str, dtypes))}" if dtypes else ""
            raise TypeError(f"{path}, a tensor of {value.dtype}, {value.layout}: must be a dense tensor{wanted}")
        if dimensions is not None and value.dim() != dimensions:
            raise ValueError(f"{path} of shape {tuple(value.shape)}: must have {dimensions} dimensions")

    return run


_finite = _plain(between("above -inf and below inf", math.isfinite))
_at_least_0 = _plain(between("at least 0 and finite", lambda value: 0 <= value < math.inf))
_probability = _plain(between("from 0 to 1", lambda value: 0 <= value <= 1))
_not_nan = _plain(between("or infinite, not NaN", lambda value: not math.isnan(value)))
_lr = _plain(between(f"above 0 and at most {_LARGEST_LR:g}", lambda value: 0 < value <= _LARGEST_LR))
_lr_or_0 = _plain(between(f"from 0 to {_LARGEST_LR:g}", lambda value: 0 <= value <= _LARGEST_LR))
_loss = _plain(between(f"between {-HUGE:g} and {HUGE:g}", lambda value: -HUGE <= value <= HUGE))
_loss_or_inf = _plain(between(f"between {-HUGE:g} and {HUGE:g}, or inf", lambda value: -HUGE <= value <= HUGE or value == math.inf))
_number = _plain(between("or NaN", lambda value: True))
_flag, _positive, _share = _plain(flag), _plain(positive), _plain(share)

_MOST_OPTIMIZERS: Final = 1000
"""Of one run; more are none."""


def _others(path: str, value: Any) -> None:
    """LR range and peak factor of each optimizer but the first."""
    _list_of(_list_of(_lr, 3), _MOST_OPTIMIZERS)(path, value)
    for index, own in enumerate(value):
        if len(own) != 3 or own[2] > 1:
            raise ValueError(f"{path}[{index}]={shown(own)}: must be two LRs, and a factor above 0 and at most 1")


_LRS: Final = {"others": _list_of(_lr, _MOST_OPTIMIZERS)}
"""What a switch and a verdict may have besides, of several optimizers."""

_CONFIG: Final = _record(
    {
        field.name: _plain(ARGUMENTS[field.name]) if field.name in ARGUMENTS else _anything
        for field in fields(Config)
        if field.default is MISSING
    }
    | dict.fromkeys(("warmup_steps", "warmup_limit", "test_interval"), _plain(count))
    | {"total_steps": optional(_whole(1)), "warmup_origin": _whole(0), "min_lr": _lr, "max_lr": _lr, "peak_factor": _share}
    | {"cooldown_start": optional(_whole(0)), "replanned_at": optional(_whole(0)), "replanned_progress": _probability},
    may={"others": _others},
)

_SWITCH: Final = _record(
    {"step": _whole(0), "lr": _lr, "probability": optional(_probability), "minimum": optional(_at_least_0), "by_test": _flag},
    may=_LRS,
)

_SPAN: Final = _plain(between(f"above 1 and at most {SPAN:g}", lambda value: 1 < value <= SPAN))
_RAMP_PLAN: Final = optional(_record({"begin": _whole(0), "steps": _whole(1), "span": _SPAN}))

_STATE: Final = _record(
    dict.fromkeys((field.name for field in fields(State)), _anything)
    | {
        "votes": _whole(0),
        "switch": optional(_SWITCH),
        "plateau_factor": _share,
        "best_epoch_loss": _not_nan,
        "bad_epochs": _whole(0),
        "setbacks": _whole(0),
        "watched": _flag,
        "start_loss": optional(_loss),
        "settled": _flag,
        "again": _flag,
        "batch": optional(_whole(1)),
        "batch_factor": _lr,
        "ramp": _RAMP_PLAN,
        "ramps": _whole(0, MOST_RAMPS),
        "raised": _lr,
    }
)

_VERDICT: Final = _record(
    {"switch": _flag, "votes": _whole(0), "probability": _probability, "lr": _lr, "minimum": _at_least_0}, may=_LRS
)

_HISTORY: Final = _record(
    {
        "steps": _whole(0),
        "folded": _whole(0),
        "width": _whole(1),
        "max_points": optional(_whole(2, _MOST_POINTS)),
        "stage": _whole(_STAGED),
        "losses": _tensor(1, "float"),
    }
)

_SUBSAMPLED: Final = {
    "lengthscale": _positive,
    "num_subsamples": _whole(1, _MOST_SUBSAMPLES),
    "fit_size": _whole(2),
    "posterior_size": _whole(2),
    "generator": _tensor(1, "byte"),
}

_ADAM: Final = _record(
    {
        "state": _dict_of(_record({"step": _tensor(0), "exp_avg": _tensor(None, "float"), "exp_avg_sq": _tensor(None, "float")})),
        "param_groups": _list_of(
            _record(
                {"lr": _positive, "eps": _at_least_0, "weight_decay": _at_least_0, "betas": _list_of(_probability, 2)}, more=True
            )
        ),
    }
)

_ENGINES: Final = {
    "ClosedFormGP": _record(
        {"lengthscale": _plain(between(f"of {MIN_LENGTHSCALE} or more", lambda v: MIN_LENGTHSCALE <= v < math.inf))}
    ),
    "GPyTorchGP": _record(_SUBSAMPLED | {"custom_kernel": _flag}),
    "PublishedGP": _record(_SUBSAMPLED | {"carried": optional(_record({"model": _dict_of(_tensor()), "adam": _ADAM}))}),
}
"""States of the engines of this package; what those of others hold is theirs."""

_DECISION: Final = _record(
    {"switch": _flag, "votes": _whole(0), "probability": _probability} | dict.fromkeys(("minima", "edges"), _list_of(_finite))
)

_POSTERIOR: Final = _record(
    {
        "grid": _tensor(1, "float"),
        "end": _tensor(0, "float"),
        "mean": _tensor(2, "float"),
        "variance": _tensor(2, "float"),
        "difference_variance": _tensor(2, "float"),
        "num_losses": _tensor(0, "int"),
    }
)


def _like(fresh: float) -> Check:
    """The check of a number of the watch, by what it is at first."""
    if isinstance(fresh, bool):
        return _flag
    if isinstance(fresh, int):
        return _whole(0)
    return _loss_or_inf if fresh == math.inf else _loss


_OF_WATCH: Final = {name: _like(fresh) for name, fresh in LossWatch().state_dict().items() if isinstance(fresh, (int, float))} | {
    name: _plain(between(f"from 0 to {HUGE**2:g}", lambda value: 0 <= value <= HUGE**2)) for name in ("noise", "calm")
}


def _watch(path: str, value: Any) -> None:
    missing = [name for name in (*Leaps.__slots__, "apart", "calm") if name not in _mapping(path, value)]
    _record({name: check for name, check in _OF_WATCH.items() if name not in missing}, more=True)(path, value)


_RAMP: Final = _record(
    dict.fromkeys(("seen", "told", "low", "high", "silent", "count"), _whole(0))
    | {"steps": _whole(1), "span": _SPAN}
    | {"level": _loss, "noise": _at_least_0, "sum": _number, "last": _number, "risen": _flag, "edge": optional(_at_least_0)},
    may={"careful": _flag},
)

_COPY: Final = _record(
    {"step": _whole(0), "lr": _lr_or_0, "level": _loss, "tensors": _by_place(_tensor()), "rest": _by_place(_anything)}, more=True
)

_RECORD: Final = _record(
    {
        "tests": _list_of(_record({"step": _whole(0), "votes": _whole(0), "probability": _probability}), MOST),
        "courses": _list_of(
            _record(
                {"until": _whole(0), "total_steps": optional(_whole(1)), "cooldown_start": optional(_whole(0)), "factor": _lr},
                may={"ramp": _RAMP_PLAN, "immediate": optional(_flag)},
            ),
            MOST,
        ),
    }
)

_HELD_OUT: Final = _record(
    {
        "start": _number,
        "best": _loss_or_inf,
        "noise": _at_least_0,
        "pairs": _whole(0),
        "lowered": _whole(0, MAX_LOWERINGS),
        "recent": _list_of(_loss, AVERAGED),
        "came": _flag,
        "observed": _record({"sum": _number, "count": _whole(0)}),
    }
)

_BUDGET: Final = _record(
    {
        "used": _at_least_0,
        "own": _at_least_0,
        "over": _flag,
        "given": optional(_record({name: _each(_plain(ARGUMENTS[name])) for name in GIVEN})),
        "recent": _list_of(_at_least_0, MEASURED),
    }
)

_GROUPS: Final = {"ratios": _list_of(_lr_or_0), "largest": _lr_or_0}

_TABLE: Final = _record(
    {
        "config": _CONFIG,
        "state": _STATE,
        "last_epoch": _whole(0),
        "step_count": _whole(1),
        "base_lrs": _list_of(_lr_or_0),
        "stage": _mapping,
        "judge": _record(
            {
                "gp": _record({"class": _plain(_text), "state": _mapping}),
                "history": _HISTORY,
                "previous": _number,
                "repeated": _whole(0),
                "varied": _flag,
                "last": optional(_VERDICT),
                "before": _list_of(_VERDICT, BEFORE),
                "next": optional(_VERDICT),
                "decision": optional(_DECISION),
                "posterior": optional(_POSTERIOR),
            }
        ),
        "groups": _record(_GROUPS, may={"others": _list_of(_record(_GROUPS), _MOST_OPTIMIZERS)}),
        "micro_batches": _record({"sum": _number, "count": _whole(0)}),
        "calls": _record({"skipped": _whole(0)}, more=True),
        "events": _list_of(_record({field.name: _text for field in fields(Event)} | {"step": _whole(0)})),
        "reader": _record(
            {
                "watch": _watch,
                "looked_at": _whole(0),
                "unread": _list_of(_number, BLOCK),
                "pending": optional(_list_of(_number, BLOCK + 1)),
            },
            may={"ramp": _RAMP},
        ),
        "record": _RECORD,
        "held_out": optional(_HELD_OUT),
        "horizon": _record(
            {
                "asked": _list_of(_whole(1)),
                "pending": optional(_list_of(_at_least_0, 3)),
                "opened": _flag,
                "moved": _flag,
                "budget": _BUDGET,
            }
        ),
        "snapshot": optional(_record({"newer": optional(_COPY), "older": optional(_COPY)}, may={"passed_by": _flag}, more=True)),
    },
    more=True,  # those of a class that derives from the scheduler
)


def check_state(name: str, state: Any) -> None:
    """Check a saved state of the present version, called `name` in messages.

    Raises:
        TypeError, ValueError: in one line that names the entry by its path, for one that is missing, of another type, out of its
            range, or that does not agree with the others.
    """
    _TABLE(name, state)
    _config_agrees(f'{name}["config"]', state["config"])
    _position_agrees(name, state)
    _judge_agrees(f'{name}["judge"]', state["judge"], state)
    _several_agree(name, state)
    _rest_agrees(name, state)


def _most(path: str, value: int, most: int, of: str) -> None:
    if value > most:
        raise ValueError(f"{path}={value!r}: must be at most {most}, {of}")


def _config_agrees(path: str, config: Mapping[str, Any]) -> None:
    try:
        check_together(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _position_agrees(name: str, state: Mapping[str, Any]) -> None:
    """The step counts, the switch, and whatever happens once a step at most."""
    config, run, taken = state["config"], state["state"], state["last_epoch"]
    latest = config["warmup_origin"] + config["warmup_limit"]
    if state["step_count"] != taken + 1:
        raise ValueError(f'{name}["step_count"]={state["step_count"]!r}: must be one more than last_epoch={taken!r}')
    path, switch = f'{name}["state"]', run["switch"]
    for key in ("votes", "bad_epochs", "setbacks"):
        _most(f'{path}["{key}"]', run[key], taken, "the steps taken")
    if switch is None:
        _most(f'{name}["last_epoch"]', taken, latest - 1, "the last step of a warm-up")
    else:
        _most(f'{path}["switch"]["step"]', switch["step"], min(taken, latest), "the steps of warm-up")
    if (run["ramp"] is not None) != ("ramp" in state["reader"]) or (run["ramp"] is not None and switch is None):
        raise ValueError(f'{path}["ramp"]={shown(run["ramp"])}: must be there with a switch and {name}["reader"]["ramp"], or not')
    for index, event in enumerate(state["events"]):
        _most(f'{name}["events"][{index}]["step"]', event["step"], taken + 1, "the coming step")


def _judge_agrees(path: str, judge: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    _history_agrees(f'{path}["history"]', judge["history"], state)
    engine = judge["gp"]
    check: Check = _ENGINES.get(engine["class"], _mapping)
    check(f'{path}["gp"]["state"]', engine["state"])
    if (posterior := judge["posterior"]) is not None:
        points = len(posterior["grid"])
        for key in ("mean", "variance", "difference_variance"):
            shape = tuple(posterior[key].shape)
            if shape != (len(posterior["mean"]), points) or 0 in shape:
                raise ValueError(f'{path}["posterior"]["{key}"] of shape {shape}: must be (S, {points}), S the same for all')


def _history_agrees(path: str, history: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """A history must be one that its losses fill."""
    steps, folded, width, points = (history[key] for key in ("steps", "folded", "width", "max_points"))
    _most(f'{path}["steps"]', steps, state["last_epoch"], "the steps taken")
    _most(f'{path}["folded"]', folded, steps, "its steps")
    if points is not None and points % 2:
        raise ValueError(f'{path}["max_points"]={points!r}: must be even')
    least = 1
    while points is not None and least * points < folded:
        least *= 2
    if width != least:
        raise ValueError(f'{path}["width"]={width!r}: must be {least} for {folded} losses in {points or "any number of"} bins')
    _most(f'{path}["stage"]', history["stage"], max(_STAGED, 2 * state["config"]["test_interval"] + _STAGED), "by test_interval")
    _most(f'{path}["steps"]', steps, folded + history["stage"], "those folded and those that can be staged")
    bins = -(-folded // width)
    expected, found = 1 + 3 * bins + steps - folded, len(history["losses"])
    if found != expected:
        raise ValueError(f'{path}["losses"] of {found} numbers: must have {expected} for {steps} steps, {folded} of them folded')
    counts = history["losses"][1 + 2 * bins : 1 + 3 * bins]
    if not all(0 <= number <= width for number in counts.tolist()):
        raise ValueError(f'{path}["losses"]: must have between 0 and {width} losses in a bin')


def group_counts(state: Mapping[str, Any]) -> list[int]:
    """Number of parameter groups of each optimizer."""
    groups = state["groups"]
    return [len(own["ratios"]) for own in (groups, *groups.get("others", ()))]


def _several_agree(name: str, state: Mapping[str, Any]) -> None:
    """All that has an entry for each optimizer must have as many."""
    number = len(state["config"].get("others", ()))
    switch, judge = state["state"]["switch"], state["judge"]
    found = {'["groups"]': state["groups"], '["state"]["switch"]': switch, '["judge"]["last"]': judge["last"]}
    found |= {f'["judge"]["before"][{index}]': verdict for index, verdict in enumerate(judge["before"])}
    for path, value in (found | {'["judge"]["next"]': judge["next"]}).items():
        if value is not None and len(others := value.get("others", ())) != number:
            raise ValueError(f'{name}{path}["others"] of {len(others)} entries: must have {number}, as the configuration has')


def _rest_agrees(name: str, state: Mapping[str, Any]) -> None:
    if any(state["config"][budget] is not None for budget in BUDGETS) and not state["horizon"]["opened"]:
        raise ValueError(f'{name}["horizon"]["opened"]=False: must be True in a run with a budget')
    if state["state"]["settled"] and state["config"]["cooldown"] is None:
        raise ValueError(f'{name}["state"]["settled"]=True: must be False in a run without cooldown="auto"')
    taken, groups = state["last_epoch"], len(state["base_lrs"])
    ratios = sum(group_counts(state))
    if not groups or ratios != groups:
        raise ValueError(f'{name}["groups"]["ratios"] of {ratios} groups: must be as many as base_lrs, {groups}, and 1 or more')
    observed = state["micro_batches"]
    if observed["count"] == 0 and observed["sum"] != 0:
        raise ValueError(f'{name}["micro_batches"]["sum"]={observed["sum"]!r}: must be 0 where none was observed')
    _most(f'{name}["reader"]["looked_at"]', state["reader"]["looked_at"], taken, "the steps taken")
    for index, test in enumerate(state["record"]["tests"]):
        _most(f'{name}["record"]["tests"][{index}]["step"]', test["step"], taken, "the steps taken")
    for index, course in enumerate(state["record"]["courses"]):
        path = f'{name}["record"]["courses"][{index}]'
        _most(f'{path}["until"]', course["until"], taken, "the steps taken")
        if course["total_steps"] is not None and course["cooldown_start"] is not None:
            _most(f'{path}["cooldown_start"]', course["cooldown_start"], course["total_steps"] - 1, "a step of the run")
    if state["reader"]["pending"] == []:
        raise ValueError(f'{name}["reader"]["pending"]=[]: must end with the flag of the ranks, or be None')
    for which, copied in (state["snapshot"] or {}).items():
        if which in ("newer", "older") and copied is not None:
            _most(f'{name}["snapshot"]["{which}"]["step"]', copied["step"], taken, "the steps taken")
    if state["state"]["switch"] is not None:
        path = f'{name}["stage"]'
        _record({"losses": _HISTORY, "epoch": optional(_HISTORY)}, more=True)(path, state["stage"])
        for key in ("losses", "epoch"):
            if state["stage"][key] is not None:
                _history_agrees(f'{path}["{key}"]', state["stage"][key], state)
        if (back_at := state["stage"].get("back_at")) is not None:
            _whole(0)(f'{path}["back_at"]', back_at)
            _most(f'{path}["back_at"]', back_at, taken, "the steps taken")
        if (plateau := state["stage"].get("plateau")) is not None:
            path = f'{path}["plateau"]'
            _record({"peak": _lr, "losses": _HISTORY})(path, plateau)
            _history_agrees(f'{path}["losses"]', plateau["losses"], state)
