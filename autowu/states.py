"""The states that runs save: read in any version, loaded whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from autowu.config import BUDGETS, Config
from autowu.history import LossHistory
from autowu.phases import SETBACK_FACTOR, warmup_lr_at
from autowu.record import MOST
from autowu.schema import check_state, group_counts, shown
from autowu.watch import BLOCK, LossWatch

__all__ = ["VERSION", "readable", "whole_or_not"]

VERSION: Final = 6
OLDEST: Final = 4
"""Version that is still read."""

_FIXED: Final[dict[str, Any]] = {
    "min_rise": 0.0,
    "warmup_origin": 0,
    "cooldown": None,
    "stable_type": "constant",
    "replanned_at": None,
    "replanned_progress": 0.0,
    **dict.fromkeys(BUDGETS),
}
"""What the configurations of version 6 have besides, of a run whose end is fixed, and where the minimum alone counts."""
_LATER: Final[Mapping[str, Mapping[str, Any]]] = {
    "config": {"cooldown": None, "stable_type": "constant"},
    "state": {"start_loss": None, "settled": False, "again": False, "batch": None, "batch_factor": 1.0}
    | {"ramp": None, "ramps": 0, "raised": 1.0},
    "judge": {"before": ()},
}
"""What the first states of version 6, which no release has saved, have not, and what it is in their runs."""
_NO_BUDGET: Final[dict[str, Any]] = {"used": 0.0, "own": 0.0, "over": False, "given": None, "recent": []}


def readable(state: Any, name: str, *groups: int) -> Mapping[str, Any]:
    """A saved state of a scheduler of class `name`, as one of :data:`VERSION`, every entry checked.

    Args:
        groups: number of parameter groups of each optimizer that is to go on with it; none to read it only.

    Raises:
        TypeError, ValueError: in one line, if it is no state, of another class, of a version that is not read, incomplete or
            damaged, or of more than so many parameter `groups`.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict={shown(state)}: must be a dictionary, as state_dict() gives it")
    _check_class(state, name)
    version, path = state.get("version"), "state_dict"
    if type(version) is not int or not OLDEST <= version <= VERSION:
        raise ValueError(f"version={shown(version)}: this autowu reads versions {OLDEST} to {VERSION}")
    if version < VERSION:
        path = f"state_dict, of version {version}, as version {VERSION}"
        try:
            state = _from_5(_from_4(state) if version == OLDEST else state)
        except KeyError as error:
            raise ValueError(f"state_dict without {shown(error.args[0])}: the state is incomplete") from None
        except Exception as error:
            raise _damaged(error) from None
    state = {"held_out": None, **state}  # which no run kept before it had any
    state = {**state, **{name: {**more, **state[name]} for name, more in _LATER.items() if isinstance(state.get(name), Mapping)}}
    check_state(path, state)
    counts = group_counts(state)
    if groups and len(counts) != len(groups):
        cure = "build it with the same ones in the same order, as AutoWU([first, second], ...)"
        cure = cure if len(counts) > 1 else "build it with that one"
        raise ValueError(f"state_dict of {len(counts)} optimizers: this scheduler has {len(groups)}; {cure}")
    for index, (saved, own) in enumerate(zip(counts, groups, strict=False)):
        if saved > own:
            cure = "add the groups that were added during the run before the state is loaded"
            which = "the optimizer" if len(groups) == 1 else f"optimizer {index}"
            raise ValueError(f"state_dict of {saved} parameter groups: {which} has {own}; {cure}")
    read: Mapping[str, Any] = state
    return read


def _check_class(state: Mapping[str, Any], name: str) -> None:
    if not isinstance(found := state.get("class"), str) or found != name:
        within = [key for key, value in state.items() if isinstance(value, Mapping) and value.get("class") == name]
        hint = f"; pass its {shown(within[0])} alone" if within else ""
        raise ValueError(f"class={shown(found)}: the state is not of {name}{hint}")


def _damaged(error: Exception) -> ValueError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"state_dict: the state is damaged ({said[:200]})")


@contextlib.contextmanager
def whole_or_not(rooms: Sequence[Any], engine: Any) -> Iterator[None]:
    """What is loaded within is loaded whole: where that fails `rooms`, what of ours they hold, and `engine` are as they were.

    An error that speaks of the state goes on; any other says that the state is damaged.
    """
    values = [value for room in rooms for own in vars(room).values() for value in (own if isinstance(own, list) else [own])]
    held = [inner for inner in (*rooms, *values) if hasattr(inner, "__dict__")]
    before = [(room, vars(room).copy()) for room in held if type(room).__module__.startswith("autowu.")]
    of_engine = copy.deepcopy(engine.state_dict()) if hasattr(engine, "state_dict") else None
    try:
        yield
    except BaseException as error:
        for room, attributes in before:
            vars(room).clear()
            vars(room).update(attributes)
        if of_engine is not None:
            engine.load_state_dict(of_engine)
        if isinstance(error, ValueError | ImportError) or not isinstance(error, Exception):
            raise
        raise _damaged(error) from error


def _from_5(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Version 6 has more of nearly everything."""
    state = {**state, "version": 6}
    for entry, more in _OF_6.items():
        state[entry] = more(state)
    return state


def _config_of_6(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every run had its end, and one warm-up. No rise was asked for, and a warm-up goes on by the rule that it began with."""
    config: Mapping[str, Any] = state["config"] | _FIXED
    return config


def _judge_of_6(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The LR was that at the minimum."""
    judge: Mapping[str, Any] = state["judge"]
    return {**judge, "decision": judge["decision"] and {**judge["decision"], "edges": judge["decision"]["minima"]}}


def _reader_of_6(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Nothing was known of losses that are passed again, nor of trials without a copy."""
    reader: Mapping[str, Any] = state["reader"]
    return {**reader, "watch": LossWatch().state_dict() | {"longest": 1, "halved": 1} | reader["watch"]}


def _record_of_6(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Neither tests nor the courses of the LR were kept: of the tests the last is known, of the courses the setbacks."""
    config, switch, courses, setbacks = state["config"], state["state"]["switch"], [], 0
    for event in state["events"]:
        if event["kind"] in ("divergence", "loss_changed"):
            plan = {"total_steps": config["total_steps"], "cooldown_start": config["cooldown_start"]}
            courses.append({"until": event["step"], **plan, "factor": SETBACK_FACTOR**setbacks})
            setbacks = max(0, setbacks + (1 if event["kind"] == "divergence" else -1))
    tests = []
    if switch is not None and switch["probability"] is not None:
        tests = [{"step": switch["step"], "votes": state["state"]["votes"], "probability": switch["probability"]}]
    return {"tests": tests, "courses": courses[-MOST:]}


def _horizon_of_6(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The end was that of the configuration."""
    return {"asked": [], "pending": None, "opened": False, "moved": False, "budget": _NO_BUDGET}


_OF_6: Final = {
    "config": _config_of_6,
    "judge": _judge_of_6,
    "reader": _reader_of_6,
    "record": _record_of_6,
    "horizon": _horizon_of_6,
}
"""Entries of a state that version 6 keeps more of, or anew, and how each follows from a state of version 5."""


def _from_4(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Version 4, of autowu 0.1.0, had all rooms' values side by side."""
    kept = ("class", "config", "state", "last_epoch", "step_count", "base_lrs", "events")
    watch = state["watch"]
    config = state["config"] | {"rollback": state["snapshot"] is not None}  # only runs that were given a model went back
    after_switch = {"losses": watch["losses"] or LossHistory(max_points=2).state_dict(), "epoch": state["epoch_losses"]}
    return {name: state[name] for name in kept} | {
        "version": 5,
        "config": config,
        "groups": {"ratios": state["ratios"], "largest": state["fallback_lr"]},
        "micro_batches": {"sum": state["observed"], "count": state["num_observed"]},
        "calls": {"skipped": watch["skipped"]},
        "judge": {
            "gp": _engine_from_4(state["gp"]),
            "history": state["history"],
            "previous": math.nan,
            "repeated": 0,
            "varied": True,
            "last": state["verdict"],
            "next": state["next_verdict"],
            "decision": state["decision"],
            "posterior": state["posterior"],
        },
        "reader": {
            "watch": watch["state"],
            "looked_at": watch["looked_at"],
            "unread": [],
            "pending": _block_from_4(state),
        },
        "stage": {} if state["state"]["switch"] is None else after_switch,
        "snapshot": _copies_from_4(Config(**config, **_FIXED), state["snapshot"]),
    }


def _block_from_4(state: Mapping[str, Any]) -> list[float] | None:
    """The block that is still to be read ended with a flag where there were several ranks; now it does in any case.

    How many losses are in it follows from where it ended: with a test, or 10 steps after the block before.
    """
    watch, interval, limit = state["watch"], state["config"]["test_interval"], state["config"]["warmup_limit"]
    pending, end = watch["pending"], watch["looked_at"]
    if pending is None:
        return None
    size = BLOCK
    if state["state"]["switch"] is None and (end % interval == 0 or end == limit):
        size = (end - 1) % interval % BLOCK + 1
    return [*pending, 0.0] if len(pending) == size else list(pending)


def _engine_from_4(engine: Mapping[str, Any]) -> Mapping[str, Any]:
    """The published fit was a flag of the GPyTorch engine."""
    if engine["class"] != "GPyTorchGP":
        return engine
    published, kernel = engine["state"]["published"], engine["state"]["custom_kernel"]
    if published and kernel:
        raise ValueError("gp: the state is of the published fit with a kernel of its own, which this autowu does not have")
    name, gone = ("PublishedGP", "custom_kernel") if published else ("GPyTorchGP", "carried")
    return {"class": name, "state": {k: v for k, v in engine["state"].items() if k not in ("published", gone)}}


def _copies_from_4(config: Config, newer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The older copy was held by the newer one, neither knew its LR, and a parameter's state stood at its place."""
    if newer is None:
        return None
    return {
        which: saved
        and {
            "step": saved["step"],
            "level": saved["level"],
            "lr": warmup_lr_at(config, saved["step"]),
            "tensors": {_key_from_4(key): tensor for key, tensor in saved["tensors"].items()},
            "rest": {_key_from_4(key): value for key, value in saved["rest"].items()},
        }
        for which, saved in {"newer": newer, "older": newer["other"]}.items()
    }


def _key_from_4(key: tuple[Any, ...]) -> tuple[Any, ...]:
    where, name = key
    if isinstance(where, tuple):
        return ("state", *where, name)
    if isinstance(where, int):
        return ("group", 0, where, name)
    return ("parameter" if where == "trained" else where, name)
