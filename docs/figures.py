"""The figure of docs/how-it-works.md: one real run, a perceptron on scikit-learn's digits with SGD, and what AutoWU did in it.

OMP_NUM_THREADS=1 python docs/figures.py [--steps 600] [--out assets/how-it-works.png]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # how sums are split over threads is enough to move a test's verdict

import torch
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU

BATCH = 64


def train(steps: int, each_step: Callable[[AutoWU], object] = lambda scheduler: None) -> AutoWU:
    """Train; the scheduler of the run, which `each_step` is shown after each of its steps."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoWU(optimizer, total_steps=steps, model=model)
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step(loss)
        each_step(scheduler)
    return scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets" / "how-it-works.png")
    args = parser.parse_args()
    train(args.steps).plot().savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
