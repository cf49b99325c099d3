"""Pure: the states that runs save, and those of older versions brought to the present one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from autowu.config import Config
from autowu.history import LossHistory
from autowu.phases import warmup_lr_at
from autowu.watch import LossWatch

__all__ = ["VERSION", "readable"]

VERSION: Final = 5


def readable(state: Any, name: str, alone: bool, keys: Iterable[str]) -> Mapping[str, Any]:
    """A saved state of a scheduler of class `name`, as one of :data:`VERSION` with `keys`; `alone`: for a run of one rank,
    as the run that saved it was.

    Raises:
        TypeError: if it is no dictionary.
        ValueError: if it is of another class or of a version that is not read, or incomplete.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict={state!r}: must be a dictionary, as state_dict() gives it")
    if state.get("class") != name:
        raise ValueError(f"class={state.get('class')!r}: the state is not of {name}")
    try:
        if (version := state.get("version")) == 4:
            state = _from_4(state, alone)
        elif version != VERSION:
            raise ValueError(f"version={version!r}: this autowu reads versions 4 and {VERSION}")
    except KeyError as error:
        raise ValueError(f"state_dict without {error}: the state is incomplete") from None
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"state_dict without {', '.join(map(repr, missing))}: the state is incomplete")
    upgraded: Mapping[str, Any] = state
    return upgraded


def _from_4(state: Mapping[str, Any], alone: bool) -> Mapping[str, Any]:
    """Version 4, of autowu 0.1.0, had all rooms' values side by side."""
    kept = ("class", "config", "state", "last_epoch", "step_count", "base_lrs", "events")
    watch, pending = state["watch"], state["watch"]["pending"]
    if alone and pending is not None:
        pending = [*pending, 0.0]  # a block now ends with a flag of the ranks, of one rank as well
    after_switch = {"losses": watch["losses"] or LossHistory(max_points=2).state_dict(), "epoch": state["epoch_losses"]}
    return {name: state[name] for name in kept} | {
        "version": 5,
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
            "watch": LossWatch().state_dict() | watch["state"],
            "looked_at": watch["looked_at"],
            "unread": [],
            "pending": pending,
        },
        "stage": {} if state["state"]["switch"] is None else after_switch,
        "snapshot": _copies_from_4(Config(**state["config"]), state["snapshot"]),
    }


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
    """The older copy was held by the newer one, and neither knew its LR."""
    if newer is None:
        return None
    copies = {"newer": newer, "older": newer["other"]}
    return {
        which: copy and {k: v for k, v in copy.items() if k != "other"} | {"lr": warmup_lr_at(config, copy["step"])}
        for which, copy in copies.items()
    }
