"""Curves as people record them: CSV, JSON lines, TensorBoard's event files, run folders of train.py, saved states."""

from __future__ import annotations

import csv
import itertools
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from autowu.report import Report

__all__ = ["Curve", "CurveError", "read_curve"]

_LONGEST: Final = 10_000_000
"""Steps: beyond that a column of steps is one of something else."""
_LOSSES: Final = ("loss", "train_loss", "training_loss", "train/loss", "loss/train", "train loss")
_LRS: Final = ("lr", "learning_rate", "train/lr", "train/learning_rate", "lr-sgd", "lr-adam", "lr-adamw")
_STEPS: Final = ("step", "global_step", "iteration", "train/global_step")
_OTHERS: Final = ("val", "test", "eval")

Rows: TypeAlias = Sequence[Mapping[str, Any]]


class CurveError(ValueError):
    """What is wrong with a file, in a line."""


@dataclass(frozen=True)
class Curve:
    """A recorded run.

    Attributes:
        name: of the file or folder.
        losses: of every optimizer step from step 0; None where none was recorded, NaN or infinite where it was that.
        lrs: of the same steps; None where they are not known.
        report: of the saved state that the curve is of; None for other files.
        notes: what was found and what was assumed, in a line each.
    """

    name: str
    losses: list[float | None]
    lrs: list[float] | None = None
    report: Report | None = None
    notes: list[str] = field(default_factory=list)


def read_curve(path: Path, column: str | None = None, lr_column: str | None = None) -> Curve:
    """Read a file or folder; `column` and `lr_column` name columns or tags, None lets them be guessed, which the notes say.

    Raises:
        CurveError: in one line that names the file, if it cannot be read or has no losses.
    """
    try:
        return _read(path, column, lr_column)
    except CurveError as error:
        raise CurveError(f"{path}: {error}") from None
    except OSError as error:
        raise CurveError(f"{path}: {error.strerror or 'cannot be read'}") from None


def _read(path: Path, column: str | None, lr_column: str | None) -> Curve:
    if path.is_dir():
        return _of_folder(path, column, lr_column)
    if "tfevents" in path.name:
        return _of_rows(path, _events(path, column, lr_column), column, lr_column)
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise CurveError("the file is empty")
    if start == b"PK" or start[:1] == b"\x80":
        return _of_state(path, _state_in(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CurveError("neither text, nor an event file of TensorBoard, nor a saved state") from None
    rows = _json_rows(text) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text)
    return _of_rows(path, rows, column, lr_column)


def _of_folder(path: Path, column: str | None, lr_column: str | None) -> Curve:
    """A run folder of train.py: every loss is in metrics.csv, the scheduler's state in the checkpoint."""
    if (path / "metrics.csv").is_file():
        curve = replace(_read(path / "metrics.csv", column, lr_column), name=str(path))
        try:
            return replace(curve, report=_of_state(path, _state_in(path / "checkpoint.pt")).report)
        except (CurveError, OSError):
            return curve  # a cosine's, or one without a checkpoint
    if files := sorted(path.glob("*tfevents*")):
        if len(files) > 1:
            raise CurveError(f"{len(files)} event files; name one of them, as {files[0].name}")
        return _read(files[0], column, lr_column)
    raise CurveError("no run of train.py (no metrics.csv), and no event file of TensorBoard")


def _csv_rows(text: str) -> Rows:
    try:
        reader = csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")
        return list(reader)
    except csv.Error as error:
        raise CurveError(f"no CSV: {error}") from None


def _json_rows(text: str) -> Rows:
    """JSON lines, a list of objects, or what transformers' Trainer saves."""
    try:
        try:
            whole = json.loads(text)
        except ValueError:
            whole = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise CurveError(f"no JSON lines: {error}") from None
    if isinstance(whole, Mapping):
        whole = whole.get("log_history", [whole])
    if not isinstance(whole, list) or not all(isinstance(row, Mapping) for row in whole):
        raise CurveError("JSON, but not an object a line")
    return whole


def _events(path: Path, column: str | None, lr_column: str | None) -> Rows:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise CurveError("an event file needs TensorBoard: pip install tensorboard") from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    try:
        events.Reload()
        tags = events.Tags()["scalars"]
    except Exception as error:  # whatever a damaged file makes it raise
        raise CurveError(f"no event file of TensorBoard: {error}") from None
    loss_tag, lr_tag = _columns(tags, column, lr_column)
    rows: dict[int, dict[str, float]] = {}
    for tag in filter(None, (loss_tag, lr_tag)):
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag] = event.value
    return [rows[step] for step in sorted(rows)]


def _state_in(path: Path) -> Mapping[str, Any]:
    """The state of an AutoWU in a file that torch saved, be it within a checkpoint."""
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file, or one of other classes: torch raises what it likes
        raise CurveError("no file that torch.load(weights_only=True) reads") from None
    places: list[Any] = [saved]
    for _ in range(3):
        for place in places:
            if isinstance(place, Mapping) and {"class", "version", "config"} <= place.keys():
                return place
        inner = [list(place.values()) if isinstance(place, Mapping) else place for place in places]
        places = [value for values in inner if isinstance(values, list) for value in values]
    raise CurveError("no state of an AutoWU in it")


def _of_state(path: Path, state: Mapping[str, Any]) -> Curve:
    try:
        report = Report.of(state)
    except (TypeError, ValueError) as error:
        raise CurveError(str(error)) from None
    losses: list[float | None] = [None] * report.step
    for step, loss in zip(report.loss_steps.tolist(), report.losses.tolist(), strict=True):
        losses[min(math.ceil(step), report.step - 1)] = loss
    end = "" if report.config.total_steps is None else f" of {report.config.total_steps}"
    notes = [f"a saved state, at step {report.step}{end}"]
    if len(report.losses) < report.step:
        notes.append(f"{len(report.losses)} points for {report.step} losses, the means of successive ones or gaps between them")
    return Curve(str(path), losses, [report.lr(step) for step in range(report.step)], report, notes)


def _columns(names: Sequence[str], column: str | None, lr_column: str | None) -> tuple[str, str | None]:
    """The names of the losses and, None for none, of the LRs."""
    for name in filter(None, (column, lr_column)):
        if name not in names:
            raise CurveError(f"no {name!r} among {', '.join(map(repr, names)) or 'its columns, of which there are none'}")
    loss = column or _guess(names, _LOSSES, ("loss",))
    if loss is None:
        found = ", ".join(map(repr, names)) or "none"
        raise CurveError(f"which is the loss? name it with --column; there are {found}")
    return loss, lr_column or _guess(names, _LRS, ("lr", "learning_rate"))


def _guess(names: Iterable[str], likely: Sequence[str], words: Sequence[str]) -> str | None:
    known = {name.lower().strip(): name for name in names if name}
    for name in likely:
        if name in known:
            return known[name]
    some = [name for low, name in known.items() if any(w in low for w in words) and not any(o in low for o in _OTHERS)]
    return some[0] if len(some) == 1 else None


def _number(value: Any) -> float | None:
    """A recorded number; None for no entry.

    Raises:
        CurveError: if it is none.
    """
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise CurveError(f"{str(value)[:40]!r} is no number") from None


def _of_rows(path: Path, rows: Rows, column: str | None, lr_column: str | None) -> Curve:
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    loss_name, lr_name = _columns(names, column, lr_column)
    step_name = _guess([name for name in names if name.lower().strip() in _STEPS], _STEPS, ())
    found = [(row, _number(row.get(loss_name))) for row in rows]
    kept = [(row, loss) for row, loss in found if loss is not None]
    if not kept:
        raise CurveError(f"no loss in {loss_name!r}")
    notes = [f"{len(kept)} losses of {loss_name!r}" + (f", LRs of {lr_name!r}" if lr_name else ", no LRs")]
    steps = _steps([row.get(step_name) for row, _ in kept] if step_name else [], len(kept), notes)
    losses: list[float | None] = [None] * (steps[-1] + 1)
    lrs = [math.nan] * len(losses)
    last = math.nan
    for step, (row, loss) in zip(steps, kept, strict=True):
        losses[step] = loss
        lr = _number(row.get(lr_name)) if lr_name else None
        lrs[step] = last = last if lr is None else lr
    return Curve(str(path), losses, _filled(lrs) if lr_name else None, None, notes)


def _steps(values: Sequence[Any], count: int, notes: list[str]) -> list[int]:
    """The optimizer step of each loss, from 0: as recorded where they grow, one after the other where they do not."""
    steps = [None if (number := _number(value)) is None or not math.isfinite(number) else int(number) for value in values]
    whole = [step for step in steps if step is not None]
    grows = len(whole) == count > 0 and all(a < b for a, b in itertools.pairwise(whole))
    if not grows or whole[-1] - whole[0] > _LONGEST:
        if values:
            notes.append("the steps recorded do not grow; the losses are taken for those of successive steps")
        return list(range(count))
    if whole[-1] - whole[0] >= count:
        notes.append(f"{count} losses in {whole[-1] - whole[0] + 1} steps; those between were not recorded")
    return [step - whole[0] for step in whole]


def _filled(lrs: list[float]) -> list[float]:
    """LRs with each gap as the LR before it."""
    filled, last = [], next((lr for lr in lrs if not math.isnan(lr)), math.nan)
    for lr in lrs:
        last = last if math.isnan(lr) else lr
        filled.append(last)
    return filled
