"""Is the LR of SGD found whatever the loss is multiplied by, and whatever the inputs?

    python benchmarks/loss_scales.py [--seeds 3 4] [--cases loss]
    python benchmarks/loss_scales.py --report

Two perceptrons train with SGD and the README's call: on digits, where the mean loss is multiplied by a number (a sum over a batch
of 128 is 128 times the mean), and on scikit-learn's `make_friedman1`, where the inputs are. Beside it stand the same without a look
at the first step, and the best LR of a grid of half decades, with OneCycleLR. The test loss is that of a loss not multiplied.

A case with a seed is a line of JSON in results/loss_scales.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from by_case import command
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from autowu import AutoWU
from autowu.first_step import FirstStep

RESULTS = Path(__file__).parent / "results" / "loss_scales.jsonl"
LOSSES = tuple(f"loss x {scale:g}" for scale in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 128, 1000, 1e4, 1e6, 1e8))
INPUTS = tuple(f"inputs x {scale:g}" for scale in (1, 10, 100, 1000))
SEEDS = (3, 4)
STEPS, BATCH = 600, 128
GRID = tuple(10**-k for k in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7))


def data(case: str, seed: int) -> tuple[Tensor, Tensor, int]:
    """Inputs, targets and outputs of a case; the last fifth of the rows is for the test."""
    if case.startswith("loss"):
        inputs, targets = load_digits(return_X_y=True)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        return torch.from_numpy(inputs).float()[order] / 16, torch.from_numpy(targets)[order], 10
    inputs, targets = make_friedman1(3000, noise=0.5, random_state=seed)
    return torch.from_numpy(inputs).float() * float(case.split()[-1]), torch.from_numpy(targets).float()[:, None], 1


def train(case: str, seed: int, lr: float | None) -> tuple[float, float]:
    """Test loss, and the peak LR, with AutoWU or at an LR."""
    inputs, targets, outputs = data(case, seed)
    scale = float(case.split()[-1]) if case.startswith("loss") else 1.0
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy if outputs > 1 else F.mse_loss
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr or 0.1, momentum=0.9)
    found = None if lr else AutoWU(optimizer, total_steps=STEPS, model=model)
    given = OneCycleLR(optimizer, lr, STEPS) if lr else None
    rows = len(targets) * 4 // 5
    for _ in range(STEPS):
        batch = torch.randint(rows, (BATCH,))
        loss = scale * criterion(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if found is not None:
            found.step(loss.item())
        if given is not None:
            given.step()
    with torch.no_grad():
        test = criterion(model(inputs[rows:]), targets[rows:]).item()
    peak = lr if found is None or found.switch is None else found.switch.lr
    return (test if math.isfinite(test) else math.inf), peak or math.nan


def run(case: str, seed: int) -> dict[str, Any]:
    """Test losses and LRs; a line of the results file."""
    now = train(case, seed, None)
    with mock.patch.object(FirstStep, "plan", lambda _, config: config):
        before = train(case, seed, None)
    # The loss by another factor is the same task at LRs less by that: one grid does for all.
    grid = [(train("loss x 1" if case.startswith("loss") else case, seed, lr)[0], lr) for lr in GRID]
    return {"case": case, "seed": seed, "now": now, "before": before, "grid": min(grid)}


def report(rows: list[dict[str, Any]]) -> str:
    """The table of the docs."""
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| | AutoWU | without a look at the first step | best of a grid |", "|---|---|---|---|"]
    for case in (*LOSSES, *INPUTS):
        own = [row for seed in seeds for row in rows if (row["case"], row["seed"]) == (case, seed)]
        cells = [", ".join(f"{row[name][0]:.3g}" for row in own) for name in ("now", "before", "grid")]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, RESULTS, (*LOSSES, *INPUTS), SEEDS, run, report)
