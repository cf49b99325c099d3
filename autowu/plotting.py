"""Pictures of a run: the loss, what the Gaussian process made of it, the LR that came of it; trust ratios. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autowu.gp import FloatArray
from autowu.scheduler import AutoWU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_cooldowns", "draw_layers", "draw_run"]

_MOST_NAMES = 40
_LONGEST_NAME = 40


def draw_run(losses: Sequence[float], lrs: Sequence[float], scheduler: AutoWU | None = None) -> Figure:
    """Draw the losses and the LRs of a run's optimizer steps, with the GP's curve and the switch of `scheduler`.

    Args:
        losses: loss of every optimizer step from step 0.
        lrs: LR of the same steps.
        scheduler: the AutoWU of the run, for its fitted curve and its switch; None draws losses and LRs alone.

    Returns:
        A figure of two panels, not shown and not registered with pyplot.

    Example:
        >>> figure = draw_run([2.0, 1.5, 1.2], [0.1, 0.2, 0.1])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['training loss', 'learning rate']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = np.arange(len(losses))
    loss_axes.plot(steps, losses, ".", color="0.6", markersize=3, label="loss of a step")
    loss_axes.set_ylabel("training loss")
    lr_axes.plot(steps, lrs, color="C0")
    lr_axes.set(xlabel="optimizer step", ylabel="learning rate", yscale="log")
    if scheduler is not None:
        _draw_decision(loss_axes, lr_axes, scheduler)
    _limit_losses(loss_axes, np.asarray(losses, dtype=np.float64))
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8, framealpha=0.9)
    return figure


def draw_cooldowns(
    losses: Mapping[float, Sequence[float]], lrs: Mapping[float, Sequence[float]], final_losses: Mapping[float, float]
) -> Figure:
    """Draw runs that differ in their `cooldown_fraction` alone: losses, LRs, and the final loss against the fraction.

    Args:
        losses: loss of every optimizer step from step 0, by fraction; drawn as means over the last fiftieth of the run.
        lrs: LR of the same steps.
        final_losses: loss of each finished run.

    Returns:
        A figure of three panels, not shown and not registered with pyplot.

    Example:
        >>> figure = draw_cooldowns({0.2: [2.0, 1.5], 0.5: [2.0, 1.6]}, {0.2: [1.0, 0.1], 0.5: [1.0, 0.1]}, {0.2: 1.4, 0.5: 1.5})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['training loss', 'learning rate', 'final test loss']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(3, 2))
    loss_axes = figure.add_subplot(grid[0, 0])
    lr_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    final_axes = figure.add_subplot(grid[:, 1])
    fractions = sorted(losses)
    everything = np.concatenate([losses[f] for f in fractions])
    # The trunk comes last, so that it lies over what all have in common.
    for color, fraction in reversed(list(enumerate(fractions))):
        curve = np.asarray(losses[fraction], dtype=np.float64)
        window = max(1, len(curve) // 50)
        smooth = np.convolve(curve, np.full(window, 1 / window), mode="valid")
        steps = np.arange(window - 1, len(curve))
        label = f"cooldown_fraction {fraction:g}" + (" (trunk)" if color == 0 else "")
        loss_axes.plot(steps, smooth, color=f"C{color}", linewidth=1, label=label)
        lr_axes.plot(np.arange(len(curve)), lrs[fraction], color=f"C{color}")
        final_axes.plot(fraction, final_losses[fraction], "o", color=f"C{color}")
    final_axes.plot(fractions, [final_losses[f] for f in fractions], color="0.7", zorder=0)
    loss_axes.set_ylabel("training loss")
    if np.nanmin(everything, initial=np.inf) > 0:  # where cooldowns differ the loss is a small part of what it was
        loss_axes.set_yscale("log")
    else:
        _limit_losses(loss_axes, everything)
    lr_axes.set(xlabel="optimizer step", ylabel="learning rate", yscale="log")
    final_axes.set(xlabel="cooldown_fraction", ylabel="final test loss")
    for axes in (loss_axes, lr_axes, final_axes):
        axes.grid(alpha=0.25)
    loss_axes.legend(loc="best", fontsize=8, framealpha=0.9)
    return figure


def draw_layers(columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> Figure:
    """Draw the trust ratios of the layers over the steps, as a heat map of their logarithms to base 10.

    Of more than 40 layers some, evenly spaced, are named. A layer that has no ratio above 0 at a step is left grey there. The
    colours end at the 1st and the 99th percentile.

    Args:
        columns: "step", "layer" and "trust_ratio" of the rows of ``layers.parquet``, which ``train.py --log-layers`` writes; others
            are ignored. Layers are drawn from the top in the order in which they come first.

    Returns:
        A figure of one panel and its colour bar, not shown and not registered with pyplot.

    Example:
        >>> columns = {"step": [0, 0, 10, 10], "layer": ["conv", "fc"] * 2, "trust_ratio": [0.01, 0.1, 0.02, 0.1]}
        >>> figure = draw_layers(columns)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['conv', 'fc']
    """
    from matplotlib.figure import Figure

    rows: dict[str, int] = {}
    row_of = [rows.setdefault(str(layer), len(rows)) for layer in columns["layer"]]
    steps, column_of = np.unique(np.asarray(columns["step"]), return_inverse=True)
    ratios = np.asarray(columns["trust_ratio"], dtype=np.float64)
    logs = np.full((len(rows), len(steps)), np.nan)
    logs[row_of, column_of] = np.log10(ratios, out=np.full_like(ratios, np.nan), where=(ratios > 0) & np.isfinite(ratios))

    figure = Figure(figsize=(10, min(9.0, 1.8 + 0.2 * len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.8")
    finite = logs[np.isfinite(logs)]
    if len(finite):
        low, high = np.percentile(finite, (1, 99))
        middles = (steps[1:] + steps[:-1]) / 2
        half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
        edges = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
        mesh = axes.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, logs, vmin=low, vmax=high)
        figure.colorbar(mesh, ax=axes, label="log10 of the trust ratio", extend="both", aspect=40, pad=0.01)
    names = list(rows)
    named = [round(k) for k in np.linspace(0, len(rows) - 1, min(len(rows), _MOST_NAMES)).tolist()]
    axes.set_yticks(named, [_shortened(names[k]) for k in named], fontsize=7)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set(xlabel="optimizer step", ylabel=f"{len(rows)} layers")
    return figure


def _shortened(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]


def _draw_decision(loss_axes: Axes, lr_axes: Axes, scheduler: AutoWU) -> None:
    posterior, switch = scheduler.posterior, scheduler.switch
    if posterior is not None:
        x = scheduler.config.warmup_origin + posterior.grid * scheduler.config.warmup_steps
        mean, std = posterior.mean.mean(0), np.sqrt(np.maximum(posterior.variance.mean(0), 0))
        loss_axes.plot(x, mean, color="C1", label="Gaussian process at the last test")
        loss_axes.fill_between(x, mean - 2 * std, mean + 2 * std, color="C1", alpha=0.25, linewidth=0, label="its mean ± 2 std")
    if switch is None:
        return
    peak = f"LR {switch.lr:.3g}"
    lowest = f"LR {switch.lr / scheduler.config.peak_factor:.3g}"
    for axes, labels in ((loss_axes, ("fitted minimum", "switch")), (lr_axes, (f"fitted minimum, {lowest}", f"switch to {peak}"))):
        if switch.minimum is not None:
            axes.axvline(switch.minimum, color="C2", linestyle="--", linewidth=1, label=labels[0])
        axes.axvline(switch.step, color="C3", linewidth=1, label=labels[1])


def _limit_losses(axes: Axes, losses: FloatArray) -> None:
    """Keep a loss that explodes from flattening the rest."""
    finite = losses[np.isfinite(losses)]
    if len(finite) == 0:
        return
    low, start = float(finite.min()), float(np.median(finite[:10]))
    top = min(float(finite.max()), start + max(start - low, 1e-12))
    margin = 0.05 * (top - low) or 1.0
    axes.set_ylim(low - margin, top + margin)
