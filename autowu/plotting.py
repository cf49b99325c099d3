"""Pictures of a run: the losses, what the tests made of them, the LR that came of it; trust ratios. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from autowu.gp import FloatArray
from autowu.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawn", "draw_cooldowns", "draw_layers", "draw_range", "draw_report", "draw_run", "draw_runs", "draw_state"]

_MOST_NAMES = 40
_LONGEST_NAME = 40

# Okabe and Ito's colours, which differ for the colour-blind and, with the shapes of line and marker, in grey.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_COLORS = (_BLUE, _RED, _GREEN, _PURPLE, _ORANGE, "#56B4E9", "#000000")

_LR_COLORS = ("black", "#56B4E9", _ORANGE, _PURPLE)  # of several optimizers

_WARMUP_SHARE: Final = 0.45
"""Of the width, at least, for the warm-up: all is decided there."""
_BAND: Final = 1.96
"""Standard deviations on either side that hold 95 %."""
_HUGE: Final = 1e100
"""No loss is drawn above it, so that arithmetic on it stays finite."""
_POINTS: Final = 500
"""At which an LR is drawn."""


class Drawn:
    """What has the parts of an AutoWU shows itself."""

    def plot(self, axes: Any = None) -> Figure:
        """Draw what this run has seen and decided so far: losses, probability of each test, LR.

        May be called at any time. Of a long run the losses are means over successive ones. What is kept for the figure is some 100
        KB and part of the state. The call waits for the losses that are on a device; a step never does. In a process group any rank
        may draw. All have the tests; the first alone has the fitted curve. The losses up to the last test are means over the ranks,
        later ones are the rank's own.

        Args:
            axes: three matplotlib Axes to draw into, for losses, probability and LR; None for a figure of its own.

        Returns:
            The figure, not shown and not registered with pyplot.

        Raises:
            ImportError: without matplotlib, the extra ``autowu[plot]``.
            TypeError, ValueError: if `axes` are not three Axes.

        Example:
            >>> import torch
            >>> from autowu import AutoWU
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> scheduler = AutoWU(optimizer, total_steps=100)
            >>> for step in range(50):
            ...     optimizer.step()
            ...     scheduler.step(1 + abs(step / 20 - 1))
            >>> figure = scheduler.plot()
            >>> [axes.get_ylabel() for axes in figure.axes]
            ['training loss', 'P(minimum past)', 'LR']
        """
        return draw_report(self._report(), axes)

    def _report(self) -> Report:
        run: Any = self
        rooms = {name: room.state_dict() for name, room in run._named_rooms().items() if name in ("judge", "record")}
        events = [vars(event) for event in run.events]
        position = {"config": asdict(run.config), "state": asdict(run._state), "last_epoch": run.last_epoch}
        return Report.of_parts({**position, **rooms, "events": events, "stage": run._stage.state_dict()})

    def _repr_html_(self) -> str:
        """For notebooks: a table of what was decided, and with matplotlib a small figure."""
        import base64
        import html

        report = self._report()
        cells = (f"<tr><th>{html.escape(what)}</th><td>{html.escape(words)}</td></tr>" for what, words in report.decided())
        table = f"<table>{''.join(cells)}</table>"
        try:
            figure = draw_report(report)
        except ImportError:
            return table
        figure.set_size_inches(5, 5)
        source = base64.b64encode(_png(figure)).decode()
        return f'{table}<img width="500" alt="losses, tests and LR of the run" src="data:image/png;base64,{source}"/>'


def draw_state(state: Mapping[str, Any], axes: Any = None) -> Figure:
    """Draw the run of a saved state, as :meth:`AutoWU.plot` draws that of a scheduler.

    Args:
        state: what ``scheduler.state_dict()`` gave, in any version that is read; a run of version 5 or before kept no tests, and
            after the switch no losses.
        axes: as there.

    Raises:
        ImportError: without matplotlib, the extra ``autowu[plot]``.
        TypeError, ValueError: if it is no state of an AutoWU, incomplete or damaged; if `axes` are not three Axes.

    Example:
        >>> import torch
        >>> from autowu import AutoWU
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> figure = draw_state(AutoWU(optimizer, total_steps=100).state_dict())
        >>> len(figure.axes)
        3
    """
    return draw_report(Report.of(state), axes)


def draw_run(losses: Sequence[float], lrs: Sequence[float], scheduler: Drawn | None = None) -> Figure:
    """Draw a run of which every loss and LR was kept, under whatever schedule; of an AutoWU as :meth:`AutoWU.plot` does.

    Args:
        losses: loss of every optimizer step from step 0.
        lrs: LR of the same steps.
        scheduler: the AutoWU of the run; None draws losses and LRs alone.

    Returns:
        A figure, not shown and not registered with pyplot.

    Example:
        >>> figure = draw_run([2.0, 1.5, 1.2], [0.1, 0.2, 0.1])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['training loss', 'LR']
    """
    if scheduler is None:
        return draw_runs({"": (losses, lrs)})
    kept: dict[str, Any] = {"loss_steps": np.arange(len(losses)), "losses": np.asarray(losses, dtype=np.float64)}
    return draw_report(replace(scheduler._report(), **kept), lrs=lrs)


def draw_runs(runs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw the losses and the LRs of several runs, one over the other.

    Args:
        runs: by name, the loss and the LR of every optimizer step from step 0; no LRs where they are not known.

    Returns:
        A figure of two panels, not shown and not registered with pyplot.
    """
    figure = _figure(figsize=(6.4, 5))
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _scale_losses(loss_axes, np.concatenate([np.asarray(losses, dtype=np.float64) for losses, _ in runs.values()]))
    for number, (name, (losses, lrs)) in enumerate(runs.items()):
        color, values = _COLORS[number % len(_COLORS)], np.asarray(losses, dtype=np.float64)
        _draw_losses(loss_axes, np.arange(float(len(values))), values, color=color, label=name or "running mean")
        style = ("-", "--", "-.", ":")[number % 4]
        lr_axes.plot(np.arange(len(lrs)), lrs, color=color, linestyle=style)
    loss_axes.set_ylabel("training loss")
    lr_axes.set(xlabel="optimizer step", ylabel="LR", yscale="log")
    _finish(loss_axes, lr_axes)
    return figure


def draw_report(report: Report, axes: Any = None, lrs: Sequence[float] | None = None) -> Figure:
    """Draw a report; `axes` as for :meth:`AutoWU.plot`, `lrs` the LR of every step from step 0 where it was not AutoWU's own."""
    if axes is None:
        figure = _figure(figsize=(6.4, 6.6))
        panels = list(figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.5, 2)))
    else:
        panels = _checked(axes)
        within: Any = panels[0].figure  # or part of one, which names the whole
        figure = within.figure
    loss_axes, test_axes, lr_axes = panels
    _draw_phases(report, panels)
    _scale_losses(loss_axes, report.losses)
    _draw_losses(loss_axes, report.loss_steps, report.losses, since=0 if report.band is None else report.phases["warm-up"][1])
    _draw_band(loss_axes, report)
    _draw_tests(test_axes, report)
    _draw_lr(lr_axes, report, lrs)
    _draw_switch(panels, report, lrs)
    _draw_events(panels, report)
    loss_axes.set_ylabel("training loss")
    _finish(*panels)
    return figure


def draw_range(
    curve: tuple[Sequence[float] | FloatArray, Sequence[float] | FloatArray],
    fitted: tuple[FloatArray, FloatArray, FloatArray] | None,
    lr: float,
    interval: tuple[float, float],
    axes: Axes | None = None,
) -> Figure:
    """Draw an LR range test: losses over LRs, and the LR that is suggested.

    Args:
        curve: (n,) LRs and (n,) losses.
        fitted: (G,) LRs, and mean and standard deviation of the loss there; None where nothing was fitted.
        lr, interval: what is suggested, and between which LRs.
        axes: to draw into; None for a figure of its own.

    Returns:
        The figure, not shown and not registered with pyplot.
    """
    if axes is None:
        axes = _figure(figsize=(6.4, 4)).subplots()
    within: Any = axes.figure
    lrs, losses = (np.asarray(values, dtype=np.float64) for values in curve)
    _scale_losses(axes, losses)
    seen = np.isfinite(losses) & (lrs > 0)
    axes.plot(lrs[seen], np.clip(losses[seen], -_HUGE, _HUGE), ".", color="0.2", alpha=0.4, markersize=4, markeredgewidth=0)
    if fitted is not None:
        places, mean, std = fitted
        low = mean - _BAND * std
        if seen.any() and losses[seen].min() > 0:  # on a log axis
            low = np.maximum(low, losses[seen].min() / 10)
        axes.fill_between(places, low, mean + _BAND * std, color=_BLUE, alpha=0.3, linewidth=0, label="95 % band")
        axes.plot(places, mean, color=_BLUE, linewidth=1.8, label="Gaussian process")
    axes.axvspan(*interval, color=_RED, alpha=0.12, linewidth=0, label=f"{interval[0]:.2g} to {interval[1]:.2g}")
    axes.axvline(lr, color=_RED, linewidth=1.3, label=f"LR {lr:.3g}")
    axes.set(xlabel="LR", ylabel="training loss", xscale="log")
    _finish(axes)
    figure: Figure = within.figure
    return figure


def _figure(**how: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install autowu[plot]") from error
    figure: Any = Figure(layout="constrained", **how)
    figure._repr_png_ = partial(_png, figure)  # else a notebook shows figures only where it has imported pyplot
    return cast("Figure", figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    return png.getvalue()


def _checked(axes: Any) -> list[Axes]:
    from matplotlib.axes import Axes

    panels = list(np.ravel(axes))
    if not all(isinstance(panel, Axes) for panel in panels):
        raise TypeError(f"axes={axes!r}: must be three matplotlib Axes or None")
    if len(panels) != 3:
        raise ValueError(f"axes, {len(panels)} of them: must be three, for losses, probability and LR")
    return panels


def _draw_phases(report: Report, panels: Sequence[Axes]) -> None:
    """Shade and name the phases, and lay out the steps: the warm-up, where all is decided, wider than its share."""
    phases = report.phases
    begin, end = phases["warm-up"][1], max(1, *(end for _, end in phases.values()))
    for shade, (name, (first, last)) in enumerate(phases.items()):
        for panel in panels:
            panel.axvspan(first, last, color="0.5", alpha=0.07 * shade, linewidth=0, zorder=0)
        middle = (first + last) / 2
        panels[0].text(middle, 1.02, name, transform=panels[0].get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    wide = 0 < begin < _WARMUP_SHARE * end
    for panel in panels:
        if wide:
            _widen(panel, begin, end)
        panel.set_xlim(0, end)
    panels[-1].set_xlabel("optimizer step" + (" (the warm-up is drawn wider)" if wide else ""))


def _widen(panel: Axes, begin: int, end: int) -> None:
    """Give the steps before `begin` their share of the width."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    ends, places = np.array([0.0, begin, end]), np.array([0.0, _WARMUP_SHARE, 1.0])

    def line(x: Any, of: FloatArray, to: FloatArray) -> FloatArray:
        slopes = np.diff(to) / np.diff(of)
        x = np.asarray(x, dtype=np.float64)
        return np.asarray(np.where(x < of[1], to[1] + (x - of[1]) * slopes[0], to[1] + (x - of[1]) * slopes[1]))

    panel.set_xscale("function", functions=(lambda x: line(x, ends, places), lambda y: line(y, places, ends)))
    ticks = [t for t in MaxNLocator(3, integer=True).tick_values(0, begin) if 0 <= t < begin]
    least = begin + 0.1 * (end - begin)  # so that two numbers do not touch
    ticks += [t for t in MaxNLocator(4, integer=True).tick_values(begin, end) if least < t <= end]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())


def _draw_losses(
    axes: Axes, steps: FloatArray, losses: FloatArray, *, color: str = "0.2", label: str = "running mean", since: int = 0
) -> None:
    """Draw losses as dots, and from step `since` on, where they are many, their running mean."""
    seen, losses = np.isfinite(losses), np.clip(losses, -_HUGE, _HUGE)
    axes.plot(steps[seen], losses[seen], ".", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
    seen &= steps >= since
    window = max(1, seen.sum() // 50)
    mean = np.full(window, 1 / window)
    if seen.any() and (window > 1 or since == 0):
        smooth = [np.convolve(values[seen], mean, mode="valid") for values in (steps, losses)]
        axes.plot(*smooth, color=color, linewidth=1, label=label)


def _draw_band(axes: Axes, report: Report) -> None:
    if (band := report.band) is None:
        return
    low, high = band.mean - _BAND * band.std, band.mean + _BAND * band.std
    if len(report.losses) and report.losses.min() > 0:  # on a log axis
        low = np.maximum(low, report.losses.min() / 10)
    axes.fill_between(band.steps, low, high, color=_BLUE, alpha=0.3, linewidth=0, label="95 % band")
    axes.plot(band.steps, band.mean, color=_BLUE, linewidth=1.8, label="Gaussian process")


def _draw_tests(axes: Axes, report: Report) -> None:
    confidence = report.config.confidence
    axes.axhline(confidence, color="0.2", linestyle="--", linewidth=1, label=f"confidence {confidence:g}")
    steps, values = [test.step for test in report.tests], [test.probability for test in report.tests]
    begun = sum(step <= report.begun for step in steps)  # of these a warm-up before
    for part in (slice(begun), slice(begun, None)) if begun else (slice(None),):
        axes.plot(steps[part], values[part], color="0.5", linewidth=0.8)
    for voted, marker, color, label in ((False, "o", "0.45", "test"), (True, "^", _RED, "test that votes")):
        some = [test for test in report.tests if (test.votes > 0) == voted]
        if some:
            x, y = [test.step for test in some], [test.probability for test in some]
            axes.plot(x, y, marker, color=color, markersize=5 if voted else 3, linestyle="", label=label)
    axes.set(ylabel="P(minimum past)", ylim=(-0.05, 1.08))


def _draw_lr(axes: Axes, report: Report, lrs: Sequence[float] | None) -> None:
    last = max(1, report.step)
    if report.state.switch is not None and report.config.total_steps is not None:
        last = report.config.total_steps
    marks = [0, report.begun, report.step, *(mark for _, end in report.phases.values() for mark in (end - 1, end))]
    marks += [mark for course in report.courses for mark in (course.until - 1, course.until)]
    steps = np.unique([step for step in (*np.linspace(0, last - 1, _POINTS).round(), *marks) if 0 <= step < last]).astype(int)
    taken, coming = steps[steps <= report.step], steps[steps >= report.step]
    number = len(report.lrs(0))
    for index in range(number):
        color, label = _LR_COLORS[index % len(_LR_COLORS)], None if number == 1 else f"optimizer {index}"
        if lrs is None or index:
            known = taken[taken >= report.begun]
            axes.plot(known, [report.lrs(int(step))[index] for step in known], color=color, linewidth=1.5, label=label)
        else:
            axes.plot(np.arange(len(lrs)), lrs, color=color, linewidth=1.5, label=label)
        if len(coming) > 1:
            values = [report.lrs(int(step))[index] for step in coming]
            axes.plot(coming, values, color=color, linestyle=":", linewidth=1.2, label=None if index else "to come")
    axes.set(ylabel="LR", yscale="log")


def _draw_switch(panels: Sequence[Axes], report: Report, lrs: Sequence[float] | None) -> None:
    if (switch := report.state.switch) is None:
        return
    at_minimum = report.lrs_at_minimum
    if switch.minimum is not None and lrs is not None and len(lrs):
        at_minimum = float(np.interp(switch.minimum, np.arange(len(lrs)), lrs)), *at_minimum[1:]
    peak, lowest_at = (" and ".join(f"{lr:.3g}" for lr in values) for values in (switch.lrs, at_minimum))
    for panel in panels:
        if switch.minimum is not None:
            lowest = f"minimum, at LR {lowest_at}" if panel is panels[-1] else None
            panel.axvline(switch.minimum, color=_GREEN, linestyle="--", linewidth=1.3, label=lowest)
        panel.axvline(switch.step, color=_RED, linewidth=1.3, label=f"switch, to LR {peak}" if panel is panels[-1] else None)


def _draw_events(panels: Sequence[Axes], report: Report) -> None:
    """Set-backs in all panels, an arrow to each copy that was put back, and a cross for whatever else befell the run."""
    loss_axes, _, lr_axes = panels
    setbacks = [event.step for event in report.events if event.kind == "divergence"]
    for number, step in enumerate(setbacks):
        for panel in panels:
            label = "setback, half the peak" if panel is lr_axes and number == 0 else None
            panel.axvline(step, color=_PURPLE, linestyle="-.", linewidth=1.3, label=label)
    for number, (step, to) in enumerate(report.returns):
        near = report.losses[np.argsort(np.abs(report.loss_steps - to), kind="stable")[:5]]
        if len(near) and (to >= report.begun or report.loss_steps[0] < report.begun):
            level = float(np.median(near))
            arrow = {"arrowstyle": "->", "color": _ORANGE, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
            loss_axes.annotate("", (to, level), (step, level), arrowprops=arrow, zorder=5)
            loss_axes.plot(to, level, "o", color=_ORANGE, markersize=4, label="back to a copy" if number == 0 else None, zorder=5)
    others = [event for event in report.events if event.kind not in ("switch", "divergence")]
    if others:
        kinds = ", ".join(dict.fromkeys(event.kind for event in others))
        where: dict[str, Any] = {"transform": lr_axes.get_xaxis_transform(), "clip_on": False}
        steps = [event.step for event in others]
        lr_axes.plot(steps, [0.06] * len(steps), "x", color="black", markersize=6, linestyle="", label=kinds, **where)


def _scale_losses(axes: Axes, losses: FloatArray) -> None:
    """A log axis where all are positive. A loss that explodes must not flatten the rest: that has two thirds of the height."""
    values = losses[np.isfinite(losses)]
    if len(values) == 0:
        return
    positive = bool(values.min() > 0)
    if positive:
        values = np.log(values)
    low = float(values.min())
    top = max(float(np.median(values[:10])), float(np.median(values)))
    top = min(float(values.max()), top + (top - low) / 2)
    margin = 0.05 * (top - low) or 0.5
    limits = np.array([low - margin, top + margin])
    if not positive:
        axes.set_ylim(*limits)
        return
    axes.set_ylim(*np.exp(limits))  # first, for a scale would fit itself to a loss that has exploded
    axes.set_yscale("log")
    _label_decades(axes, limits)


def _label_decades(axes: Axes, limits: FloatArray) -> None:
    """Numbers as people write them, some on any range: a log axis has none of its own within a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    narrow = limits[1] - limits[0] < np.log(8)
    decades = (limits[1] - limits[0]) / np.log(10)
    axes.yaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1.0, 3.0) if decades < 2.5 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(*panels: Axes) -> None:
    for panel in panels:
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="best", fontsize=8, framealpha=0.85, borderpad=0.3, handlelength=1.6, labelspacing=0.3)


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
    figure = _figure(figsize=(11, 5.5))
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
    _scale_losses(loss_axes, everything)
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
    rows: dict[str, int] = {}
    row_of = [rows.setdefault(str(layer), len(rows)) for layer in columns["layer"]]
    steps, column_of = np.unique(np.asarray(columns["step"]), return_inverse=True)
    ratios = np.asarray(columns["trust_ratio"], dtype=np.float64)
    logs = np.full((len(rows), len(steps)), np.nan)
    logs[row_of, column_of] = np.log10(ratios, out=np.full_like(ratios, np.nan), where=(ratios > 0) & np.isfinite(ratios))

    figure = _figure(figsize=(10, min(9.0, 1.8 + 0.2 * len(rows))))
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
