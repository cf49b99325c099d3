"""Runs of 20 to 160 steps: AutoWU beside a cosine with the best LR of a grid, and beside one with an LR taken unseen.

    python benchmarks/short_runs.py

Networks for scikit-learn's digits, batches of 64, three seeds. The cosine has 5 % linear warm-up. Unseen is the LR passed by
habit: 0.1 to SGD with momentum, 1e-3 to AdamW. ``results/short_runs.json`` holds the mean test accuracies; cases
that it has are not run again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

from autowu import AutoWU

RESULTS = Path(__file__).parent / "results" / "short_runs.json"
LENGTHS = (20, 30, 40, 60, 80, 100, 130, 160)
SEEDS = (0, 1, 2)
UNSEEN = {"sgd": 0.1, "adamw": 1e-3}
GRID = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
TASKS = [(network, optimizer) for network in ("plain", "normalised") for optimizer in UNSEEN]
METHODS: dict[str, dict[str, Any]] = {
    "autowu": {},
    "autowu, patience 2": {"patience": 2},
    "autowu, warm-up half": {"max_warmup_fraction": 0.5, "cooldown_fraction": 0.4},
}


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return x[400:], y[400:], x[:400], y[:400]


def parts(network: str, optimizer: str, lr: float) -> tuple[nn.Module, Optimizer]:
    norm = nn.BatchNorm1d if network == "normalised" else nn.Identity
    layers = [nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    if optimizer == "sgd":
        return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def run(network: str, optimizer_name: str, steps: int, seed: int, lr: float, arguments: dict[str, Any] | None = None) -> float:
    """The test accuracy after a run: a cosine at `lr`, or AutoWU with `arguments`."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data(seed)
    model, optimizer = parts(network, optimizer_name, lr)
    scheduler = None if arguments is None else AutoWU(optimizer, total_steps=steps, model=model, **arguments)
    warmup = max(1, round(0.05 * steps))
    for step in range(steps):
        if scheduler is None:
            decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, decay)
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler is not None:
            scheduler.step(loss)
    model.eval()
    with torch.no_grad():
        accuracy: float = (model(test_x).argmax(1) == test_y).float().mean().item()
    return accuracy


def measured(network: str, optimizer: str, steps: int) -> dict[str, float]:
    """Mean accuracies over the seeds, by method."""

    def mean(lr: float, arguments: dict[str, Any] | None = None) -> float:
        return round(statistics.mean(run(network, optimizer, steps, seed, lr, arguments) for seed in SEEDS), 3)

    unseen = UNSEEN[optimizer]
    grid = {lr: mean(lr) for lr in GRID[optimizer]}
    row = {"cosine, best of the grid": max(grid.values()), "cosine, unseen": grid[unseen]}
    return row | {name: mean(unseen, arguments) for name, arguments in METHODS.items()}


def main() -> None:
    logging.getLogger("autowu").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for steps in LENGTHS:
        for network, optimizer in TASKS:
            case = {"network": network, "optimizer": optimizer, "steps": steps}
            if any(case.items() <= row.items() for row in rows):
                continue
            rows.append(case | measured(network, optimizer, steps))
            print(" ".join(map(str, rows[-1].values())), flush=True)
            RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    names = ["cosine, best of the grid", "cosine, unseen", *METHODS]
    print(f"\n| steps | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for steps in LENGTHS:
        means = [statistics.mean(row[name] for row in rows if row["steps"] == steps) for name in names]
        print(f"| {steps} | {' | '.join(f'{100 * value:.1f}' for value in means)} |")


if __name__ == "__main__":
    main()
