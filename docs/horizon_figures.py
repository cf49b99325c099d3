"""The figures of docs/horizon.md: real runs that are extended, that search again, and whose batches grow; and of a second look.

A perceptron on scikit-learn's digits with SGD, as in docs/figures.py.

OMP_NUM_THREADS=1 python docs/horizon_figures.py [--out assets]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # how sums are split over threads is enough to move a test's verdict

import torch
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU
from autowu.plotting import draw_run


class Run:
    """A run on the digits, noisy ones, so that a larger batch is worth something."""

    def __init__(self, **arguments: Any) -> None:
        torch.manual_seed(0)
        digits = load_digits()
        self.images = torch.tensor(digits.data / 16, dtype=torch.float32)
        self.labels = torch.tensor(digits.target)
        self.batch = 32
        self.losses: list[float] = []
        self.lrs: list[float] = []
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = AutoWU(optimizer, model=self.model, **arguments)

    def train(self, until: int, each: Callable[[int], object] = lambda step: None) -> None:
        """Train to step `until`, calling `each` before every step."""
        for step in range(self.scheduler.last_epoch, until):
            each(step)
            picked = torch.randint(len(self.images), (self.batch,))
            inputs = self.images[picked] + 0.5 * torch.randn(self.batch, 64)
            loss = nn.functional.cross_entropy(self.model(inputs), self.labels[picked])
            self.losses.append(loss.item())
            self.lrs.append(float(self.scheduler.get_last_lr()[0]))
            self.scheduler.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.scheduler.optimizer.step()
            self.scheduler.step(loss)


def extended() -> Run:
    """Within its cooldown a run of 800 steps is made one of 1,600."""
    run = Run(total_steps=800, cooldown_fraction=0.4)
    run.train(650)
    run.scheduler.extend(total_steps=1600)
    run.train(1600)
    return run


def searched_again() -> Run:
    """After 700 steps all pixels change places."""
    run = Run(max_warmup_steps=300)
    run.train(700)
    run.images = run.images[:, torch.randperm(64)]
    run.scheduler.rewarm()
    run.train(1500)
    run.scheduler.start_cooldown(400)
    run.train(1901)
    return run


def growing() -> Run:
    """From step 500 to 800 the batch grows from 32 to 128, and the LR with its square root."""
    run = Run(total_steps=1500, cooldown_fraction=0.3)

    def grow(step: int) -> None:
        run.batch = 32 + min(96, max(0, (step - 500) * 96 // 300))
        run.scheduler.batch_size(run.batch, rule="sqrt")

    run.train(1500, grow)
    return run


def settled() -> Run:
    """No length: the cooldown begins when the loss has stopped improving."""
    run = Run(cooldown="auto", cooldown_fraction=0.25, max_warmup_steps=300)
    while not run.scheduler.should_stop:
        run.train(run.scheduler.last_epoch + 1)
    return run


def looked_again() -> Run:
    """A peak that is a twentieth of the usual is found out in a run of 3,000 steps."""
    run = Run(total_steps=3000, peak_factor=0.02)
    run.train(3000)
    return run


FIGURES = {"extend": extended, "rewarm": searched_again, "ramp": growing, "rest": settled, "second-look": looked_again}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets")
    args = parser.parse_args()
    for name, run in FIGURES.items():
        done = run()
        figure = done.scheduler.plot()
        if name == "rewarm":  # of what was before a new search the scheduler keeps nothing
            figure = draw_run(done.losses, done.lrs, done.scheduler)
        figure.savefig(args.out / f"horizon-{name}.png", dpi=110)
        print(name, done.scheduler, *(event.message for event in done.scheduler.events), sep="\n  ")


if __name__ == "__main__":
    main()
