"""Pure: what a user gives to the scheduler, checked and resolved; the length of a run and of its cooldown, changed later.

:data:`ARGUMENTS` is the one list of the scheduler's arguments. A test holds its signature, its docstring and the table of the
documentation to it.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from autowu.checks import (
    Check,
    between,
    count,
    device,
    flag,
    fraction,
    group_lrs,
    integer,
    one_of,
    optional,
    positive,
    process_group,
    share,
)
from autowu.families import lr_range, peak_factor, peak_lag
from autowu.gp import LossCurveGP
from autowu.kin import parts
from autowu.multi_optimizer import MultiOptimizer, told
from autowu.multi_optimizer import checked as optimizers
from autowu.schedules import COOLDOWN_TYPES, STABLE_TYPES, WARMUP_TYPES, decades

__all__ = [
    "ARGUMENTS",
    "BUDGETS",
    "MAX_WARMUP_FRACTION",
    "PUBLISHED",
    "UNMEASURED",
    "Config",
    "brief",
    "check_together",
    "checked",
    "configure",
    "cooldown_start",
    "described",
    "extended",
    "forked",
    "lag_share",
    "lengthened",
    "per_optimizer",
    "warmup_share",
]

TESTS_PER_WARMUP: Final = 60
MAX_WARMUP_FRACTION: Final = 0.32
"""Of a short run, what the longest warm-up may take."""
WARMUP_STEPS: Final = 9.4
"""On the square root of a run's steps, the longest warm-up of a long run: more losses than that show no more."""
OPEN_WARMUP: Final = 600
"""Steps of a full warm-up in a run without a fixed end: as in one of 1,875 steps, about the longest that the default was measured
on. A shorter one decides on fewer than a hundred losses a decade of LR; a longer one costs more than an unknown length may be
worth."""
UNMEASURED: Final = 2**20
"""Origin of a warm-up that waits for the length of the run to be estimated; until then the LR is `min_lr`."""
BUDGETS: Final = ("total_samples", "total_tokens", "total_seconds")
"""Lengths of a run that are not known in steps."""
MAX_LAG: Final = 0.5
"""Decades of LR: what a fitted curve can tell apart, and so the most that the loss of a warm-up counts as lagging behind its LR."""


def brief(value: Any) -> str:
    """The repr of a dataclass, in which there is nothing said of other optimizers where there are none."""
    told = (f"{field.name}={own!r}" for field in fields(value) if (own := getattr(value, field.name)) or field.name != "others")
    return f"{type(value).__name__}({', '.join(told)})"


@dataclass(frozen=True)
class Config:
    """The arguments of a run, checked and resolved; steps are optimizer steps. Built by :func:`configure`.

    Attributes:
        total_steps: T; None as long as the end is open.
        total_samples, total_tokens, total_seconds: the budget of a run whose end moves as it is used; at most one is not None.
        steps_per_epoch: None for a run that was given no epochs.
        warmup_steps: length W of the axis on which the LR would grow from `min_lr` to `max_lr`.
        warmup_limit: step of the axis at which a warm-up ends without a switch: W, or an earlier start of the cooldown.
        warmup_origin: step of the run at which the axis begins: 0, but for a warm-up that is begun anew.
        cooldown: "auto" for one that begins as soon as the loss has stopped improving.
        cooldown_fraction, cooldown_start: share of T for the cooldown and its first step, None as long as that is open; used
            where it is not immediate.
        replanned_at, replanned_progress: a step of the cooldown from which on it is to last until another T, and the share of it
            that lay behind by then; None and 0 for one that goes on as it began.
        test_interval: steps between tests.
        peak_factor: the peak LR over that at the far edge of the valley (at the minimum where `min_rise` is 0), the lag included.
        others: `min_lr`, `max_lr` and `peak_factor` of each other optimizer, where there are several; those above are of the first.
    """

    total_steps: int | None
    total_samples: int | None
    total_tokens: int | None
    total_seconds: float | None
    steps_per_epoch: int | None
    min_lr: float
    max_lr: float
    warmup_steps: int
    warmup_limit: int
    warmup_origin: int
    warmup_type: str
    warmup_unit: str
    immediate_cooldown: bool
    cooldown: str | None
    cooldown_type: str
    cooldown_fraction: float
    cooldown_start: int | None
    replanned_at: int | None
    replanned_progress: float
    stable_type: str
    decay_phase_stat: str | None
    decay_phase_factor: float
    test_interval: int
    patience: int
    confidence: float
    min_contrast: float
    min_rise: float
    peak_factor: float
    rollback: bool
    watch: bool
    others: tuple[tuple[float, float, float], ...] = ()

    __repr__ = brief

    @property
    def decades(self) -> float:
        """Decades of LR that the warm-up passes through at the pace of its end, see :func:`~autowu.schedules.decades`.

        Of several optimizers those of the one with the widest range.
        """
        own = decades(self.min_lr, self.max_lr, self.warmup_type)
        return max([own, *(decades(low, high, self.warmup_type) for low, high, _ in self.others)]) if self.others else own

    @cached_property
    def end(self) -> float:
        """T; infinite as long as the end is open."""
        return math.inf if self.total_steps is None else self.total_steps

    @cached_property
    def budget(self) -> tuple[str, float] | None:
        """Name and size of the budget, if there is one."""
        for name in BUDGETS:  # in half the time of next()
            if (value := getattr(self, name)) is not None:
                return name, value
        return None

    @cached_property
    def cooldown_from(self) -> float:
        """First step of a cooldown that is not immediate; infinite as long as it is open."""
        return math.inf if self.cooldown_start is None else self.cooldown_start


def _optimizer(name: str, value: Any) -> Optimizer:
    if isinstance(value, list | tuple):
        together = MultiOptimizer(optimizers(name, value))
        for index, one in enumerate(together.optimizers):
            group_lrs(f"{name}[{index}]", one)
        value = together.optimizers[0] if len(together.optimizers) == 1 else together
    if not isinstance(value, Optimizer):
        raise TypeError(f"{name}={told(value)}: must be a torch.optim.Optimizer, or a list of them")
    own = {id(group) for part in parts(value) for group in part.param_groups}
    if len(parts(value)) > 1 and not {id(group) for group in value.param_groups} <= own:
        cure = "pass these, as a list"
        raise ValueError(f"{name}={type(value).__name__}: steps several optimizers through parameter groups of its own; {cure}")
    return group_lrs(name, value)


def per_optimizer(check: Check) -> Check:
    """The check of a value for all optimizers, or of a list of one for each."""

    def run(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(optional(check)(f"{name}[{index}]", own) for index, own in enumerate(value))
        return check(name, value)

    return run


def _model(name: str, value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}={reprlib.repr(value)}: must be a torch.nn.Module or None")
    return value


def _hook(name: str, value: Any) -> Callable[[int], object]:
    if not callable(value):
        raise TypeError(f"{name}={value!r}: must be callable with a step, or None")
    hook: Callable[[int], object] = value
    return hook


def _interval(name: str, value: Any) -> int | str:
    if isinstance(value, str) and value != "epoch":
        raise ValueError(f"{name}={value!r}: must be an integer, 'epoch' or None")
    return value if isinstance(value, str) else count(name, value)


def _engine(name: str, value: Any) -> str | LossCurveGP:
    if isinstance(value, str) and value not in ("closed-form", "gpytorch"):
        raise ValueError(f"{name}={value!r}: must be 'closed-form', 'gpytorch' or an engine object")
    if not isinstance(value, (str, LossCurveGP)):
        raise TypeError(f"{name}={value!r}: must be 'closed-form', 'gpytorch' or an object with posterior() and max_points")
    return value


ARGUMENTS: Final[Mapping[str, Check]] = {
    "optimizer": _optimizer,
    "steps_per_epoch": optional(count),
    "total_epochs": optional(count),
    "total_steps": optional(count),
    "total_samples": optional(count),
    "total_tokens": optional(count),
    "total_seconds": optional(positive),
    "immediate_cooldown": flag,
    "cooldown": one_of(None, "auto"),
    "cooldown_type": one_of(*COOLDOWN_TYPES),
    "cooldown_fraction": fraction,
    "min_lr": optional(per_optimizer(positive)),
    "max_lr": optional(per_optimizer(positive)),
    "max_warmup_fraction": optional(share),
    "max_warmup_steps": optional(count),
    "warmup_type": one_of(*WARMUP_TYPES),
    "warmup_unit": one_of("step", "epoch"),
    "stable_type": one_of(*STABLE_TYPES),
    "decay_phase_stat": one_of(None, "loss"),
    "decay_phase_factor": share,
    "test_interval": optional(_interval),
    "patience": count,
    "confidence": between("between 0.5 and 1", lambda value: 0.5 < value < 1),
    "min_contrast": between("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "min_rise": between("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "peak_factor": optional(per_optimizer(share)),
    "gp": _engine,
    "device": optional(device),
    "seed": integer,
    "rollback": flag,
    "model": optional(_model),
    "snapshot_device": optional(device),
    "on_rollback": optional(_hook),
    "watch": flag,
    "process_group": optional(process_group),
}
"""The scheduler's arguments, in the order of its signature, and the check of each."""


PUBLISHED: Final[Mapping[str, Any]] = {
    "min_lr": 1e-5,
    "max_lr": 1.0,
    "max_warmup_fraction": 0.5,
    "warmup_type": "exp",
    "test_interval": "epoch",
    "patience": 3,
    "min_contrast": 0.0,
    "min_rise": 0.0,
    "peak_factor": 1.0,
    "immediate_cooldown": True,
    "cooldown_type": "cosine",
    "cooldown_fraction": 0.2,
    "stable_type": "constant",
    "rollback": False,
    "watch": False,
}
"""The arguments of the paper's preset (Kim et al. 2021 and its code)."""


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's arguments out of `given`, each as its check gives it back.

    Raises:
        TypeError, ValueError: naming the argument, its value and what it may be.
    """
    return {name: check(name, given[name]) for name, check in ARGUMENTS.items()}


def configure(arguments: Mapping[str, Any], expected: float | None = None) -> Config:
    """Resolve the arguments of :func:`checked`: what is None by the optimizer's family, shares as steps.

    Args:
        arguments: of the scheduler.
        expected: steps of a run whose arguments do not say them, where they are known all the same.

    Raises:
        TypeError, ValueError: for arguments that do not go together, naming them, their values and what they may be.
    """
    steps_per_epoch = arguments["steps_per_epoch"]
    total = _length(arguments)
    _check_epochs(arguments)
    _check_decay(arguments)
    ranges = _lr_ranges(arguments)
    warmup_steps, limit, start = _warmup(total, arguments)
    interval = steps_per_epoch if arguments["test_interval"] == "epoch" else arguments["test_interval"]
    factors = _peak_factors(arguments, ranges, warmup_steps, total or expected)
    (min_lr, max_lr, factor), *others = ((*ends, factor) for ends, factor in zip(ranges, factors, strict=True))
    resolved = {
        "total_steps": total,
        "min_lr": min_lr,
        "max_lr": max_lr,
        "warmup_steps": warmup_steps,
        "warmup_limit": limit,
        "warmup_origin": UNMEASURED if _is_unmeasured(arguments) else 0,
        "cooldown_start": start,
        "replanned_at": None,
        "replanned_progress": 0.0,
        "test_interval": interval or max(1, round(limit / TESTS_PER_WARMUP)),
        "peak_factor": factor,
        "others": tuple(others),
    }
    values = {**arguments, **resolved}
    return Config(**{field.name: values[field.name] for field in fields(Config)})


def _for_each(name: str, arguments: Mapping[str, Any]) -> list[Any]:
    """The value of an argument for each optimizer; None where it follows from its family."""
    value, number = arguments[name], len(parts(arguments["optimizer"]))
    if not isinstance(value, list | tuple):
        return [value] * number
    if len(value) != number:
        said = "one number" if number == 1 else f"one number for all, or a list of {number}, one for each optimizer"
        raise ValueError(f"{name}={list(value)!r}: must be {said}")
    return list(value)


def _lr_ranges(arguments: Mapping[str, Any]) -> list[tuple[float, float]]:
    """`min_lr` and `max_lr` of each optimizer."""
    own = zip(parts(arguments["optimizer"]), _for_each("min_lr", arguments), _for_each("max_lr", arguments), strict=True)
    ranges = []
    for optimizer, low, high in own:
        least, most = lr_range(optimizer)
        ranges.append((least if low is None else low, most if high is None else high))
    for index, (low, high) in enumerate(ranges):
        if not low < high:
            at = f"[{index}]" if len(ranges) > 1 else ""
            raise ValueError(f"min_lr{at}={low!r}: must be below max_lr{at}={high!r}")
    return ranges


def _peak_factors(
    arguments: Mapping[str, Any], ranges: Sequence[tuple[float, float]], warmup_steps: int, total: float | None
) -> list[float]:
    """`peak_factor` of each optimizer."""
    factors = []
    own = zip(parts(arguments["optimizer"]), ranges, _for_each("peak_factor", arguments), strict=True)
    for optimizer, ends, given in own:
        lagging = lag_share(optimizer, *ends, arguments["warmup_type"], warmup_steps)
        factors.append(peak_factor(optimizer, total) * lagging if given is None else given)
    return factors


def lag_share(optimizer: Optimizer, min_lr: float, max_lr: float, warmup_type: str, warmup_steps: int) -> float:
    """The LR as many steps ago as the loss lags behind it, see :func:`~autowu.families.peak_lag`, as a share of that now."""
    span = decades(min_lr, max_lr, warmup_type)
    return 10 ** -min(peak_lag(optimizer) * span / warmup_steps, MAX_LAG) if span else 1.0


def check_together(config: Mapping[str, Any]) -> None:
    """Check that the values of a saved :class:`Config`, each in its own range, go together.

    Raises:
        ValueError: naming the values and what they may be.
    """
    _check_epochs(config)
    _check_decay(config)
    given = [f"{name}={config[name]!r}" for name in ("steps_per_epoch", *BUDGETS) if config[name] is not None]
    if len(given) > 1 or (given and config["immediate_cooldown"] and config["steps_per_epoch"] is None):
        raise ValueError(f"{', '.join(given)}: must be one length, and with a budget immediate_cooldown=False")
    steps, limit, origin = (config[name] for name in ("warmup_steps", "warmup_limit", "warmup_origin"))
    if not config["min_lr"] < config["max_lr"]:
        raise ValueError(f"min_lr={config['min_lr']!r}: must be below max_lr={config['max_lr']!r}")
    for index, (low, high, _) in enumerate(config.get("others", ())):
        if not low < high:
            raise ValueError(f"others[{index}]={(low, high)!r}: must be an LR and a higher one")
    total, start, again = (config[name] for name in ("total_steps", "cooldown_start", "replanned_at"))
    if (total is None) != (start is None):
        raise ValueError(f"total_steps={total!r}, cooldown_start={start!r}: must both be known, or neither")
    latest = steps
    if total is not None:
        if limit == steps > total:
            raise ValueError(f"warmup_steps={steps!r}: must be at most total_steps={total!r}")
        if start >= total:
            raise ValueError(f"cooldown_start={start!r}: must be below total_steps={total!r}")
        latest = min(steps, (total - 1 if config["immediate_cooldown"] else start) - origin)
    if again is not None and (total is None or not start <= again < total):
        raise ValueError(f"replanned_at={again!r}: must be a step of the cooldown, from {start!r} on and below {total!r}")
    if limit > latest:
        raise ValueError(f"warmup_limit={limit!r}: must be at most {latest}, by the steps of warm-up and cooldown")


def _length(arguments: Mapping[str, Any]) -> int | None:
    """T; None where it is not known in steps."""
    epochs = ("steps_per_epoch", "total_epochs", "total_steps")
    given = [f"{name}={arguments[name]!r}" for name in (*epochs, *BUDGETS) if arguments[name] is not None]
    if len(given) > 1 and any(arguments[name] is not None for name in BUDGETS):
        raise ValueError(f"{', '.join(given)}: give one length, or none for a run whose end is open")
    return _total_steps(**{name: arguments[name] for name in epochs})


def _is_unmeasured(arguments: Mapping[str, Any]) -> bool:
    """Whether the warm-up can be planned only once it is known what a step uses of a budget."""
    return arguments["max_warmup_steps"] is None and any(arguments[name] is not None for name in BUDGETS)


def _total_steps(steps_per_epoch: int | None, total_epochs: int | None, total_steps: int | None) -> int | None:
    """T; None where no length is given at all."""
    if total_steps is not None:
        if steps_per_epoch is not None or total_epochs is not None:
            raise ValueError(
                f"total_steps={total_steps!r}: give it or steps_per_epoch={steps_per_epoch!r} and "
                f"total_epochs={total_epochs!r}, not both"
            )
        return total_steps
    if steps_per_epoch is None and total_epochs is None:
        return None
    if steps_per_epoch is None or total_epochs is None:
        raise TypeError(f"steps_per_epoch={steps_per_epoch!r}, total_epochs={total_epochs!r}: give both, or total_steps")
    return steps_per_epoch * total_epochs


def _check_epochs(arguments: Mapping[str, Any]) -> None:
    """Raise where an argument speaks of epochs in a run that was given none."""
    if arguments["steps_per_epoch"] is not None:
        return
    for name in ("warmup_unit", "test_interval"):
        if arguments[name] == "epoch":
            raise ValueError(f"{name}='epoch': needs steps_per_epoch and total_epochs")
    if _decays(arguments):
        raise ValueError(f"{_decay_words(arguments)}: act once an epoch and need steps_per_epoch and total_epochs")


def _check_decay(arguments: Mapping[str, Any]) -> None:
    """Raise where the constant phase is to decay and cannot."""
    if arguments["immediate_cooldown"] and arguments["stable_type"] != "constant":
        raise ValueError(
            f"stable_type={arguments['stable_type']!r}: acts on the constant phase, which immediate_cooldown=True leaves out; "
            "pass immediate_cooldown=False"
        )
    if arguments["immediate_cooldown"] and _decays(arguments):
        raise ValueError(
            f"{_decay_words(arguments)}: act on the constant phase, which immediate_cooldown=True leaves out; "
            "pass immediate_cooldown=False"
        )
    if arguments["decay_phase_stat"] == "loss" and arguments["decay_phase_factor"] == 1.0:
        raise ValueError("decay_phase_factor=1.0: with decay_phase_stat='loss' it must be above 0 and below 1")
    if arguments["cooldown"] is None:
        return
    if arguments["immediate_cooldown"]:
        raise ValueError(f"cooldown={arguments['cooldown']!r}: ends the constant phase, which immediate_cooldown=True leaves out")
    if arguments["decay_phase_stat"] == "loss":
        given = f"cooldown={arguments['cooldown']!r}, decay_phase_stat='loss'"
        raise ValueError(f"{given}: both wait for a loss that has stopped improving; give one")


def _decays(arguments: Mapping[str, Any]) -> bool:
    return arguments["decay_phase_stat"] is not None or arguments["decay_phase_factor"] != 1.0


def _decay_words(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={arguments[name]!r}" for name in ("decay_phase_stat", "decay_phase_factor"))


def warmup_share(given: float | None, total: float) -> float:
    """`max_warmup_fraction` of a run of `total` steps."""
    return min(MAX_WARMUP_FRACTION, WARMUP_STEPS / math.sqrt(total)) if given is None else given


def _warmup(total: int | None, arguments: Mapping[str, Any]) -> tuple[int, int, int | None]:
    """Length of the warm-up's axis, the step at which it ends at the latest, and the first step of the cooldown."""
    largest, steps = arguments["max_warmup_fraction"], arguments["max_warmup_steps"]
    if total is None:
        if arguments["immediate_cooldown"]:
            need = "needs the step of the end; give total_steps, or steps_per_epoch and total_epochs"
            raise ValueError(f"immediate_cooldown=True: decays from the switch to the end, and {need}")
        return steps or OPEN_WARMUP, steps or OPEN_WARMUP, None
    largest = warmup_share(largest, total)
    asked = f"max_warmup_fraction={largest!r}" if steps is None else f"max_warmup_steps={steps!r}"
    if steps is None:
        steps = int(largest * total) or round(largest * total)  # the shortest of runs has one step of warm-up
    start = _cooldown_start(total, arguments["cooldown_fraction"])
    limit = steps if arguments["immediate_cooldown"] else min(steps, start)
    if not 1 <= limit < total:
        raise ValueError(
            f"{asked}: leaves {limit} steps of warm-up in a run of {total} steps; "
            f"both the warm-up and the rest of the run need at least 1 step"
        )
    return steps, limit, start


def _cooldown_start(total_steps: int, cooldown_fraction: float) -> int:
    return total_steps - max(1, round(cooldown_fraction * total_steps))


def cooldown_start(config: Config, cooldown_fraction: float) -> int:
    """Step at which a cooldown over the last `cooldown_fraction` of the run begins.

    Raises:
        TypeError, ValueError: unless the fraction is a number above 0 and below 1, and the run has a length.
    """
    share_of_run = fraction("cooldown_fraction", cooldown_fraction)
    if config.budget is not None:
        known = "with a budget the step is not known; that fraction begins where scheduler.progress reaches the rest"
        raise ValueError(f"cooldown_fraction={cooldown_fraction!r}: {known}")
    if config.total_steps is None:
        raise ValueError(f"cooldown_fraction={cooldown_fraction!r}: the end of this run is open, and no step of it is known")
    return _cooldown_start(config.total_steps, share_of_run)


def described(config: Config) -> dict[str, Any]:
    """The values of a configuration, with the name of the argument beside that of a value that is called otherwise."""
    called = {"warmup_steps": "warmup_steps (by max_warmup_fraction)"}
    return {called.get(name, name): value for name, value in vars(config).items()}


def extended(config: Config, other: Config) -> Config:
    """`config` with the length of `other`, if that is the longer: in epochs, or in steps where neither has epochs.

    The warm-up stays as it is; the cooldown moves to the new end. A run with a budget, or whose end is open, stays as it is.
    """
    if config.budget is not None or config.total_steps is None or other.total_steps is None:
        return config
    if config.steps_per_epoch is not None and other.steps_per_epoch is not None:
        total = config.steps_per_epoch * (other.total_steps // other.steps_per_epoch)
    elif config.steps_per_epoch is None and other.steps_per_epoch is None:
        total = other.total_steps
    else:
        return config
    if total <= config.total_steps:
        return config
    return lengthened(config, total)


def lengthened(config: Config, total: int, earliest: int = 0) -> Config:
    """`config` with T = `total`, and the cooldown over its last `cooldown_fraction`, not before step `earliest`."""
    start = max(_cooldown_start(total, config.cooldown_fraction), earliest)
    return replace(config, total_steps=total, cooldown_start=start, replanned_at=None, replanned_progress=0.0)


def forked(config: Config, step: int, cooldown_fraction: float, progress: float | None = 0.0) -> Config:
    """The configuration of a run with another `cooldown_fraction`, if it could stand at `step` as a run of `config` does.

    Of a run with a budget `progress` says how much of it is used.

    Raises:
        TypeError, ValueError: naming the argument, its value and what it may be.
    """
    if config.budget is not None:
        share_left = 1 - max(fraction("cooldown_fraction", cooldown_fraction), config.cooldown_fraction)
        if progress is None or progress > share_left:
            used = f"{share_left:.4g} of the budget at most, used are {progress or 0:.4g}"
            raise ValueError(f"cooldown_fraction={cooldown_fraction!r}: must be forked off by {used}")
        return replace(config, cooldown_fraction=float(cooldown_fraction))
    start = cooldown_start(config, cooldown_fraction)
    if config.immediate_cooldown:
        raise ValueError(
            f"cooldown_fraction={cooldown_fraction!r}: without effect in a run with immediate_cooldown=True; "
            "a run to fork needs immediate_cooldown=False"
        )
    assert config.cooldown_start is not None
    if min(config.warmup_steps, start - config.warmup_origin) != config.warmup_limit:
        raise ValueError(
            f"cooldown_fraction={cooldown_fraction!r}: the warm-up would end by step {min(config.warmup_steps, start)}, not by "
            f"step {config.warmup_limit} as in this run; both cooldowns must begin at step {config.warmup_steps} or later"
        )
    latest = min(start, config.cooldown_start)
    if config.decay_phase_stat == "loss" and start != config.cooldown_start:
        latest -= 1  # of an epoch that ends where one of the cooldowns begins only the other run takes note
    if step > latest:
        raise ValueError(
            f"cooldown_fraction={cooldown_fraction!r}: must be forked off at step {latest} or before, the run is at step {step}"
        )
    return replace(config, cooldown_fraction=float(cooldown_fraction), cooldown_start=start)
