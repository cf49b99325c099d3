"""The film of the README: what the Gaussian process believes of the loss as the warm-up goes on, until it decides.

OMP_NUM_THREADS=1 python docs/film.py [--out assets/film.gif] [--still assets/film.png]

The run is that of docs/figures.py. A frame is a test; the still has four of them, for print.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import figures
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from autowu import AutoWU
from autowu.report import Report

STEPS = 600
AFTER = (1, 12, 24, 36)
"""Steps after the switch at which there is a frame."""
BLUE, GREEN, RED, GREY = "#0072B2", "#009E73", "#D55E00", "0.35"
COLORS = 128
BAND = 1.96
ASSETS = Path(__file__).parent.parent / "assets"


def reports() -> list[Report]:
    """The run as it stood at each test that had a curve, and after the switch."""
    kept: list[Report] = []

    def keep(scheduler: AutoWU) -> None:
        switch, step = scheduler.switch, scheduler.last_epoch
        if switch is None or step in (switch.step, *(switch.step + after for after in AFTER)):
            report = Report.of(scheduler.state_dict())
            new = not kept or len(report.tests) > len(kept[-1].tests)
            if report.band is not None and (new or switch is not None):
                kept.append(report)

    figures.train(STEPS, each_step=keep)
    return kept


def draw(report: Report, panels: Sequence[Axes], last: Report) -> None:
    """One frame; `last` is the report whose steps and losses set the axes."""
    loss_axes, test_axes, lr_axes = panels
    switch, config = report.state.switch, report.config
    loss_axes.plot(report.loss_steps, report.losses, ".", color=GREY, alpha=0.5, markersize=5, markeredgewidth=0, label="loss")
    if (band := report.band) is not None:
        low = np.maximum(band.mean - BAND * band.std, last.losses.min() / 10)
        loss_axes.fill_between(band.steps, low, band.mean + BAND * band.std, color=BLUE, alpha=0.3, linewidth=0)
        loss_axes.plot(band.steps, band.mean, color=BLUE, linewidth=2, label="Gaussian process, 95 % band")
    loss_axes.set(ylabel="training loss", yscale="log", yticks=(0.3, 1, 3), ylim=(last.losses.min() * 0.6, last.losses.max() * 1.3))
    loss_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    test_axes.axhline(config.confidence, color=GREY, linestyle="--", linewidth=1)
    test_axes.plot([test.step for test in report.tests], [test.probability for test in report.tests], color=GREY, linewidth=1)
    votes = [test for test in report.tests if test.votes]
    test_axes.plot([test.step for test in votes], [test.probability for test in votes], "^", color=RED, markersize=6, label="vote")
    test_axes.set(ylabel="P(past)", ylim=(-0.08, 1.12), yticks=(0, 1))
    steps = np.arange(report.step + 1)
    lrs = [report.lr(int(step)) for step in steps]
    lr_axes.plot(steps, lrs, color="black", linewidth=2)
    lr_axes.plot(steps[-1:], lrs[-1:], "o", color="black", markersize=4)
    lr_axes.set(ylabel="LR", xlabel="optimizer step", yscale="log", ylim=(5e-5, 3), yticks=(1e-4, 1e-2, 1))
    lr_axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in panels:
        axes.set_xlim(0, last.step)
        axes.grid(alpha=0.2)
        if switch is not None and switch.minimum is not None:
            axes.axvline(switch.minimum, color=GREEN, linestyle="--", linewidth=1.5, label="minimum")
            axes.axvline(switch.step, color=RED, linewidth=1.5, label="switch")
    loss_axes.set_title(caption(report), fontsize=11)


def caption(report: Report) -> str:
    switch, test = report.state.switch, report.tests[-1]
    if switch is not None:
        return f"switch at step {switch.step}: LR and weights go back"
    if test.votes:
        return f"step {report.step}: past the minimum, vote {test.votes} of {report.config.patience}"
    return f"step {report.step}: is the minimum past? probability {test.probability:.2f}"


def frame(report: Report, last: Report) -> Image.Image:
    figure = Figure(figsize=(6.4, 4.6), dpi=100)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.11, top=0.94, hspace=0.13)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1.2))
    draw(report, panels, last)
    panels[0].legend(loc="lower left", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def film(kept: Sequence[Report], path: Path) -> None:
    """An animated GIF: a frame for each report, slower where a test votes."""
    frames = [frame(report, kept[-1]) for report in kept]
    palette = frames[-1].quantize(COLORS)
    reduced = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in frames]
    times = [700 if report.tests[-1].votes or report.state.switch else 200 for report in kept]
    times[-1] = 4000
    reduced[0].save(path, save_all=True, append_images=reduced[1:], duration=times, loop=0, optimize=True)


def still(kept: Sequence[Report], path: Path) -> None:
    """Four frames side by side: early, at the minimum, at the first vote, after the switch."""
    switch = kept[-1].state.switch
    assert switch is not None
    assert switch.minimum is not None
    before = [report for report in kept if report.state.switch is None]
    minimum = switch.minimum
    near = min(before, key=lambda report: abs(report.step - minimum))
    voted = next(report for report in before if report.tests[-1].votes)
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    for report, part in zip(
        (before[len(before) // 3], near, voted, kept[-1]), figure.subfigures(1, 4, squeeze=False)[0], strict=True
    ):
        draw(report, part.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1.2)), kept[-1])
        part.axes[0].set_title(caption(report), fontsize=9)
    figure.subfigs[0].axes[0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "film.gif")
    parser.add_argument("--still", type=Path, default=ASSETS / "film.png")
    args = parser.parse_args()
    kept = reports()
    film(kept, args.out)
    still(kept, args.still)


if __name__ == "__main__":
    main()
