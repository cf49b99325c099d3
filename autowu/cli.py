"""The command line: what AutoWU decides on a recorded curve, runs drawn and compared, an LR out of a range test."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from autowu.config import UNMEASURED
from autowu.curves import Curve, CurveError, read_curve
from autowu.families import LR_RANGES
from autowu.history import LossHistory
from autowu.phases import warmup_lr_at
from autowu.plotting import draw_range, draw_report, draw_runs
from autowu.range_test import judged, unheard
from autowu.scheduler import AutoWU
from autowu.switching import MIN_LOSSES
from autowu.version import __version__

__all__ = ["main"]

_WARMUP_FRACTION: Final = 0.32
_PAPER_TESTS: Final = 15
"""Of a warm-up, where no epochs are known: those of 30 epochs, the half of which is warm-up."""
_LOG_OF_A_HUGE_LR: Final = 40.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, or 2 for what was asked and cannot be."""
    args = _parser().parse_args(argv)
    try:
        if args.save is not None:
            _check_place(args.save, args.force)
        told, lines, figure = args.run(args)
        if args.save is not None:
            _save(figure(), args.save)
            told, lines = told | {"figure": str(args.save)}, [*lines, f"figure in {args.save}"]
    except (CurveError, ImportError) as error:
        print(f"autowu: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_plain(told), indent=2) if args.json else "\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autowu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"autowu {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    files = "CSV, JSON lines, an event file of TensorBoard, a run folder of train.py, or a saved state"
    for name, run, what in (
        ("replay", _replay, "what AutoWU would have decided on a recorded warm-up, by the default and by the paper's rule"),
        ("plot", _plot, "draw a run, or compare several"),
        ("range", _range, "an LR out of an LR range test, with its uncertainty"),
    ):
        command = commands.add_parser(name, help=what, description=f"{what}. A curve is {files}.", allow_abbrev=False)
        command.set_defaults(run=run)
        many: dict[str, Any] = {"nargs": "+"} if name == "plot" else {}
        command.add_argument("curve", type=Path, metavar="RUN" if name == "plot" else "CURVE", help=files, **many)
        command.add_argument("--column", help="column or tag of the losses (default: guessed)")
        command.add_argument("--lr-column", help="column or tag of the LRs (default: guessed)")
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
        drawn = Path("autowu.png") if name == "plot" else None
        command.add_argument(
            "--save", type=Path, metavar="FIG", default=drawn, help="write the figure" + (f" (default: {drawn})" if drawn else "")
        )
        command.add_argument("--force", action="store_true", help="overwrite FIG")
        if name != "plot":
            command.add_argument("--optimizer", choices=[*LR_RANGES][:-1], default="sgd", help="its family (default: %(default)s)")
            command.add_argument("--min-lr", type=_positive, help="LR of step 0 where none are recorded (default: by family)")
            command.add_argument("--max-lr", type=_positive, help="LR at the end of a full warm-up (default: by family)")
        if name == "replay":
            command.add_argument("--warmup-steps", type=_count, metavar="N", help="length of a full warm-up (default: all losses)")
            command.add_argument("--steps-per-epoch", type=_count, metavar="N", help="the paper's rule tests once an epoch")
    return parser


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number above 0")
    return value


def _count(text: str) -> int:
    if not 1 <= (value := int(text)) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer from 1 to 1e9")
    return value


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_place(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise CurveError(f"{path}: exists; --force overwrites it, --save names another")
    if not path.parent.is_dir():
        raise CurveError(f"{path}: there is no folder {path.parent}")


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()  # first, so that a figure that cannot be drawn leaves no file
    try:
        figure.savefig(drawn, dpi=150, format=path.suffix[1:].lower() or "png")
        path.write_bytes(drawn.getvalue())
    except ValueError as error:
        raise CurveError(f"{path}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CurveError(f"{path}: cannot be written: {error.strerror or error}") from None


# ---------------------------------------------------------------- the LRs of a curve


class _Ramp:
    """The growing part of a curve: its losses, and the LRs that they were recorded at.

    Args:
        curve: as read.
        args: of the command line.

    Raises:
        CurveError: if its LR does not grow for as long as a test needs.
    """

    def __init__(self, curve: Curve, args: argparse.Namespace) -> None:
        self.curve, self.kind, self.lrs, first = curve, "exp", curve.lrs, 0
        count = len(curve.losses)
        if curve.report is not None:
            config, switch = curve.report.config, curve.report.state.switch
            self.min_lr, self.max_lr, self.kind, self.steps = config.min_lr, config.max_lr, config.warmup_type, config.warmup_steps
            first = 0 if config.warmup_origin == UNMEASURED else config.warmup_origin
            count = min(count - first, self.steps, config.warmup_limit if switch is None else switch.step - first)
            since = f" from step {first} on" if first else ""
            self.note = f"LRs: the run's own warm-up{since}, {self.min_lr:g} to {self.max_lr:g} in {self.steps} steps"
            self.lrs = None
        elif curve.lrs is not None:
            count = self._growing(curve.lrs)
            self.min_lr, self.max_lr, self.kind = *self._ends(curve.lrs[:count]), self._kind(curve.lrs[:count])
            self.steps = count
            self.note = f"LRs: as recorded, {self.min_lr:.4g} to {self.max_lr:.4g}, growing for {count} steps"
        else:
            low, high = LR_RANGES[args.optimizer]
            self.min_lr, self.max_lr, self.steps = args.min_lr or low, args.max_lr or high, count
            if not self.min_lr < self.max_lr:
                raise CurveError(f"--min-lr {self.min_lr:g}: must be below --max-lr {self.max_lr:g}")
            self.note = f"LRs: assumed, {self.min_lr:g} to {self.max_lr:g}, growing exponentially for {count} steps"
        self.losses = curve.losses[first : first + count]
        if (finite := sum(loss is not None and math.isfinite(loss) for loss in self.losses)) < MIN_LOSSES:
            raise CurveError(f"{curve.name}: {finite} finite losses while the LR grows; a test needs {MIN_LOSSES}")

    def _growing(self, lrs: Sequence[float]) -> int:
        """Steps before the LR first falls."""
        falls = next((step for step in range(1, len(lrs)) if lrs[step] < lrs[step - 1] * (1 - 1e-6)), len(lrs))
        if not all(math.isfinite(lr) and lr >= 0 for lr in lrs[:falls]) or not lrs[falls - 1] > max(lrs[0], 0):
            raise CurveError(f"{self.curve.name}: the recorded LR does not grow from the start, so it tells of no LR's worth")
        return falls

    def _ends(self, lrs: Sequence[float]) -> tuple[float, float]:
        return next(lr for lr in lrs if lr > 0), lrs[-1]

    def _kind(self, lrs: Sequence[float]) -> str:
        """Whether LRs grow on a line rather than by a factor: where they are in the middle."""
        low, high = self._ends(lrs)
        middle = lrs[len(lrs) // 2]
        return "linear" if abs(middle - (low + high) / 2) < abs(middle - math.sqrt(low * high)) else "exp"

    def scheduler(self, args: argparse.Namespace, paper: bool, steps: int) -> AutoWU:
        """One that makes the tests of a warm-up of so many `steps` on this ramp."""
        total = max(math.ceil(steps / _WARMUP_FRACTION), steps + 2)
        lrs: dict[str, Any] = {
            "min_lr": self.min_lr,
            "max_lr": self._max_lr(steps),
            "warmup_type": self.kind,
            "max_warmup_fraction": (steps + 0.5) / total,
        }
        optimizer = _optimizer(args.optimizer)
        if not paper:
            if self.curve.report is not None:
                lrs["peak_factor"] = self.curve.report.config.peak_factor
            return AutoWU(optimizer, total_steps=total, rollback=False, **lrs)
        interval = args.steps_per_epoch or max(1, steps // _PAPER_TESTS)
        engine: dict[str, Any] = {} if importlib.util.find_spec("gpytorch") else {"gp": "closed-form"}
        return AutoWU.paper(optimizer, total_steps=total, test_interval=interval, **lrs, **engine)

    def _max_lr(self, steps: int) -> float:
        """LR after `steps`, where recorded ones go on as they grew."""
        if self.lrs is None or steps == self.steps:
            return self.max_lr
        if self.kind == "linear":
            return self.min_lr + (self.max_lr - self.min_lr) * steps / self.steps
        return math.exp(min(math.log(self.min_lr) + math.log(self.max_lr / self.min_lr) * steps / self.steps, _LOG_OF_A_HUGE_LR))

    def lr_at(self, position: float, scheduler: AutoWU) -> float:
        """LR at a step of the ramp, fractional."""
        if self.lrs is None:
            return warmup_lr_at(scheduler.config, position)
        logs = np.log(np.maximum(self.lrs[: len(self.losses)], self.min_lr))
        return float(np.exp(np.interp(position, np.arange(len(logs)), logs)))

    def peak(self, lr: float, scheduler: AutoWU) -> float:
        """The peak that a scheduler has found on LRs of its own, as it follows from the recorded ones at the same step."""
        if self.lrs is None:
            return lr
        config, places = scheduler.config, np.arange(self.steps + 1)
        own = np.log([warmup_lr_at(config, float(place)) for place in places])
        place = float(np.interp(math.log(lr / config.peak_factor), own, places))
        return max(config.peak_factor * self.lr_at(place, scheduler), config.min_lr)


def _optimizer(family: str) -> torch.optim.Optimizer:
    """One that counts as of this family, and trains nothing."""
    weight = [torch.nn.Parameter(torch.zeros(1))]
    if family == "adam":
        return torch.optim.AdamW(weight, lr=1.0)
    kind = {"sgd": "SGD", "lars": "LARS", "lamb": "LAMB"}[family]  # a family goes by the name of the class
    optimizer: torch.optim.Optimizer = type(kind, (torch.optim.SGD,), {})(weight, lr=1.0, momentum=0.9)
    return optimizer


# ---------------------------------------------------------------- the commands

Told = tuple[dict[str, Any], list[str], Any]


def _replay(args: argparse.Namespace) -> Told:
    curve = read_curve(args.curve, args.column, args.lr_column)
    ramp = _Ramp(curve, args)
    steps = args.warmup_steps or ramp.steps
    notes, rules, lines, first = [*curve.notes, ramp.note], [], [], None
    if steps != ramp.steps:
        notes.append(f"a full warm-up of {steps} steps")
    if not importlib.util.find_spec("gpytorch"):
        notes.append("GPyTorch is not installed: the paper's rule with the closed-form fit, not its own")
    if args.steps_per_epoch is None:
        notes.append(f"no epochs given: the paper's rule with {_PAPER_TESTS} tests in the warm-up")
    for name, paper in (("default", False), ("paper", True)):
        with unheard():
            scheduler = ramp.scheduler(args, paper, steps)
            _feed(scheduler, ramp.losses)
        first = first or scheduler
        rules.append({"rule": name, **_decision(scheduler, ramp)})
        lines.append(f"{name + ' rule:':14}{_words(rules[-1], scheduler)}")
    told = {"curve": curve.name, "notes": notes, "steps": len(ramp.losses), "rules": rules}
    lrs = None if ramp.lrs is None else ramp.lrs[: len(ramp.losses)]
    assert first is not None
    report = first._report()
    if (switch := report.state.switch) is not None:  # the LR by the recorded ones
        report = replace(report, state=replace(report.state, switch=replace(switch, lr=rules[0]["lr"])))
    return told, [curve.name, *(f"  {note}" for note in notes), *lines], lambda: draw_report(report, lrs=lrs)


def _feed(scheduler: AutoWU, losses: Sequence[float | None]) -> None:
    """Pass the losses as they were recorded, to the switch: those after it would be of another LR."""
    scheduler.optimizer.step()  # once, for torch; AutoWU counts its own calls where nothing trains
    for loss in losses:
        if scheduler.switch is not None:
            return
        scheduler.step(loss)


def _decision(scheduler: AutoWU, ramp: _Ramp) -> dict[str, Any]:
    switch, report = scheduler.switch, scheduler._report()
    told: dict[str, Any] = {"switch_step": None, "by_test": None, "minimum_step": None, "lr_at_minimum": None, "lr": None}
    told |= {"probability": report.tests[-1].probability if report.tests else None}
    if switch is not None:
        told |= {"switch_step": switch.step, "by_test": switch.by_test, "lr": switch.lr, "minimum_step": switch.minimum}
        if switch.minimum is not None:
            told |= {"lr_at_minimum": ramp.lr_at(switch.minimum, scheduler), "lr": ramp.peak(switch.lr, scheduler)}
    return told


def _words(told: Mapping[str, Any], scheduler: AutoWU) -> str:
    probability = "no test" if told["probability"] is None else f"probability {told['probability']:.3f}"
    if told["switch_step"] is None:
        return f"no switch within {scheduler.last_epoch} steps; the last test: {probability}"
    how = "" if told["by_test"] else ", not by test (warm-up at its limit, or a loss that exploded)"
    if told["minimum_step"] is None:
        return f"switch at step {told['switch_step']}{how}; no curve was fitted, no LR found"
    lowest = f"minimum at step {told['minimum_step']:.0f}, LR {told['lr_at_minimum']:.4g}, {probability}"
    return f"switch at step {told['switch_step']} to LR {told['lr']:.4g}{how}; {lowest}"


def _plot(args: argparse.Namespace) -> Told:
    curves = [read_curve(path, args.column, args.lr_column) for path in args.curve]
    runs, lines = [], []
    for curve in curves:
        known = [loss for loss in curve.losses if loss is not None and math.isfinite(loss)]
        last = known[-max(1, len(known) // 50) :]
        told: dict[str, Any] = {"run": curve.name, "steps": len(curve.losses), "notes": curve.notes}
        told |= {"final_loss": sum(last) / len(last) if last else None, "switch_step": None, "lr": None}
        if curve.report is not None and (switch := curve.report.state.switch) is not None:
            told |= {"switch_step": switch.step, "lr": switch.lr}
        runs.append(told)
        end = "no finite loss" if told["final_loss"] is None else f"loss at the end {told['final_loss']:.4g}"
        switched = "" if told["switch_step"] is None else f", switch at step {told['switch_step']} to LR {told['lr']:.4g}"
        lines.append(f"{curve.name}: {len(curve.losses)} steps, {end}{switched}")

    def figure() -> Any:
        if len(curves) == 1 and curves[0].report is not None:
            return draw_report(curves[0].report)
        return draw_runs({curve.name: (_floats(curve.losses), curve.lrs or []) for curve in curves})

    return {"runs": runs}, lines, figure


def _floats(losses: Sequence[float | None]) -> list[float]:
    return [math.nan if loss is None else loss for loss in losses]


def _range(args: argparse.Namespace) -> Told:
    curve = read_curve(args.curve, args.column, args.lr_column)
    ramp = _Ramp(curve, args)
    steps = len(ramp.losses)
    scheduler = ramp.scheduler(args, False, steps)
    history = LossHistory()
    for loss in _floats(ramp.losses):
        history.append(loss)
    try:
        posterior = scheduler.gp.posterior(history.curve(steps))
    except ValueError as error:
        raise CurveError(f"{curve.name}: {error}") from None
    found, (low, high) = judged(posterior, scheduler.config)
    factor, position = scheduler.config.peak_factor, found.minima[0] * steps
    lowest, *at = (ramp.lr_at(place * steps, scheduler) for place in (found.minima[0], found.edges[0], low, high))
    lr, least, most = (factor * value for value in at)
    notes = [*curve.notes, ramp.note]
    if not found.switch:
        notes.append("the loss is not clearly past a minimum: go on to a higher LR, or take more steps; the LR is a guess")
    told = {"curve": curve.name, "notes": notes, "steps": steps, "lr": lr, "lr_range": [least, most], "sure": found.switch}
    told |= {"minimum_step": position, "lr_at_minimum": lowest, "probability": found.probability}
    line = f"LR {lr:.4g}, between {least:.4g} and {most:.4g} with 95 % confidence; minimum at step {position:.0f}, LR {lowest:.4g}"
    curve_at = [ramp.lr_at(step, scheduler) for step in range(steps)], _floats(ramp.losses)
    mean, std = posterior.mean[0], np.sqrt(np.maximum(posterior.variance[0], 0))
    fitted = np.array([ramp.lr_at(place * steps, scheduler) for place in posterior.grid]), mean, std
    return told, [curve.name, *(f"  {note}" for note in notes), line], lambda: draw_range(curve_at, fitted, lr, (least, most))
