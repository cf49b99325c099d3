"""The figure of docs/how-it-works.md: one real run, a perceptron on scikit-learn's digits with SGD, and what AutoWU did in it.

OMP_NUM_THREADS=1 python docs/figures.py [--steps 600] [--out assets/how-it-works.png]
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # how sums are split over threads is enough to move a test's verdict

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU
from autowu.plotting import draw_run

BATCH = 64


def train(steps: int) -> tuple[list[float], list[float], list[tuple[int, int]], AutoWU]:
    """Train; the losses and LRs of the steps, the tests as pairs of step and votes, and the scheduler."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoWU(optimizer, total_steps=steps, model=model)
    losses, lrs, tests = [], [], []
    for step in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        lrs.append(float(scheduler.get_last_lr()[0]))
        before = scheduler.decision
        scheduler.step(loss)
        if scheduler.decision is not None and scheduler.decision is not before:
            tests.append((step, scheduler.decision.votes))
    return losses, lrs, tests, scheduler


def draw(losses: list[float], lrs: list[float], tests: list[tuple[int, int]], scheduler: AutoWU) -> Figure:
    """The picture of the run, its phases, tests and the step that it went back to named."""
    figure = draw_run(losses, lrs, scheduler)
    loss_axes, lr_axes = figure.axes
    config, switch = scheduler.config, scheduler.switch
    assert switch is not None
    phases: dict[str, tuple[float, float]] = {"warm-up": (0, switch.step), "stable": (switch.step, config.cooldown_from)}
    phases["cooldown"] = (config.cooldown_from, config.end)
    for shade, (name, (start, end)) in enumerate(phases.items()):
        for axes in (loss_axes, lr_axes):
            axes.axvspan(start, end, color="0.5", alpha=0.06 * (shade + 1), linewidth=0, zorder=0)
        loss_axes.text((start + end) / 2, 1.02, name, transform=loss_axes.get_xaxis_transform(), ha="center", va="bottom")
    for votes, marker, label in ((False, "|", "test"), (True, "v", "test with a vote")):
        steps = [step for step, count in tests if (count > 0) == votes]
        lr_axes.plot(steps, [lrs[step] for step in steps], marker, color="0.3", markersize=6, linestyle="", label=label)
    back = re.search(r"back at step (\d+)", scheduler.events[0].message)
    if back:
        step = int(back[1])
        level = float(np.mean(losses[step - 5 : step + 5]))
        loss_axes.plot(step, level, "o", color="C4", label=f"copy of step {step}, put back at the switch")
        arrow = {"arrowstyle": "->", "color": "C4", "linewidth": 1.5, "shrinkB": 4}
        loss_axes.annotate("", (step, level), (switch.step, level), arrowprops=arrow)
    loss_axes.legend(loc="upper right", fontsize=8, framealpha=0.9)
    lr_axes.legend(loc="lower center", fontsize=8, framealpha=0.9)
    lr_axes.set_xlim(0, len(losses))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets" / "how-it-works.png")
    args = parser.parse_args()
    run = train(args.steps)
    for event in run[-1].events:
        print(event.message)
    draw(*run).savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
