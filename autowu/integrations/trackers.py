"""AutoWU in experiment trackers: TensorBoard, Weights & Biases, trackio, MLflow, and what logs as they do. Imports none of them."""

from __future__ import annotations

import io
from typing import Any, Final

from autowu.scheduler import AutoWU

__all__ = ["log", "log_figure", "values"]

_PHASES: Final = ("warmup", "stable", "cooldown", "done")


def values(scheduler: AutoWU) -> dict[str, float]:
    """What a run shows of itself as numbers for a tracker; waits for no device.

    ``autowu/lr`` is the LR of the coming step, of the parameter group with the largest. ``autowu/phase`` is 0 in the warm-up, 1 at
    the peak, 2 in the cooldown, 3 after the end. ``autowu/probability`` is that of the minimum being past, by the last test, once
    there was one. ``autowu/events`` is how many have befallen the run.

    Example:
        >>> import torch
        >>> scheduler = AutoWU(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), total_steps=100)
        >>> values(scheduler)
        {'autowu/lr': 0.0001, 'autowu/phase': 0.0, 'autowu/events': 0.0}
    """
    found = {"autowu/lr": float(scheduler.lr_at(scheduler.last_epoch)), "autowu/phase": float(_PHASES.index(scheduler.phase))}
    if tests := scheduler._rooms.record.tests:  # on all ranks
        found["autowu/probability"] = tests[-1].probability
    return found | {"autowu/events": float(len(scheduler.events))}


def log(scheduler: AutoWU, tracker: Any, step: int | None = None) -> None:
    """Log :func:`values` after a step.

    Args:
        tracker: TensorBoard's ``SummaryWriter``; the module ``wandb`` or one of its runs; the module ``trackio``; the module
            ``mlflow``; a logger of Lightning.
        step: of the values; None for the optimizer steps taken.

    Raises:
        TypeError: if the tracker logs in none of these ways.
    """
    step = scheduler.last_epoch if step is None else step
    if hasattr(tracker, "add_scalar"):
        for name, value in values(scheduler).items():
            tracker.add_scalar(name, value, step)
    elif hasattr(tracker, "log_metrics"):
        tracker.log_metrics(values(scheduler), step=step)
    elif hasattr(tracker, "log"):
        tracker.log(values(scheduler), step=step)
    else:
        raise TypeError(f"tracker={tracker!r}: must have add_scalar, log_metrics or log, as those of docs/trackers.md")


def log_figure(scheduler: AutoWU, tracker: Any) -> bool:
    """Log the figure of the run, :meth:`AutoWU.plot`, under the name "autowu"; whether the tracker takes figures.

    Raises:
        ImportError: without matplotlib, the extra ``autowu[plot]``.
    """
    figure = scheduler.plot()
    if hasattr(tracker, "add_figure"):
        tracker.add_figure("autowu", figure, scheduler.last_epoch, close=False)
    elif hasattr(tracker, "log_figure"):
        tracker.log_figure(figure, "autowu.png")
    elif (image := getattr(_package_of(tracker), "Image", None)) is not None:
        png = io.BytesIO()
        figure.savefig(png, dpi=150, format="png")
        tracker.log({"autowu/figure": image(_pixels(png))}, step=scheduler.last_epoch)
    else:
        return False
    return True


def _package_of(tracker: Any) -> Any:
    """The module of W&B or trackio, of which a tracker is a run or itself."""
    import sys

    name = getattr(tracker, "__name__", None) or type(tracker).__module__
    return sys.modules.get(str(name).partition(".")[0])


def _pixels(png: io.BytesIO) -> Any:
    from PIL import Image

    return Image.open(png).convert("RGB")
