"""Two optimizers under one schedule: Muon for matrices and AdamW for the rest, AutoWU beside a grid of pairs of LRs.

    python benchmarks/pairs.py

The tasks had no part in any choice: made-up classes, and scikit-learn's second Friedman regression. Two Muons: torch's, and the
trust-scaled one of this package. The grid runs a cosine, with 5 % linear warm-up, from each pair of peak LRs.
``results/pairs.jsonl`` holds a row for each run; runs that it has are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sklearn.datasets import make_classification, make_friedman2
from torch import Tensor, nn
from torch.optim import Optimizer

from autowu import AutoWU
from autowu.optim import Muon

RESULTS: Final = Path(__file__).parent / "results" / "pairs.jsonl"
SEEDS: Final = (0, 1)
GRID: Final = {
    "torch": ((0.003, 0.01, 0.03, 0.1), (3e-4, 1e-3, 3e-3, 1e-2)),
    "autowu": ((0.001, 0.003, 0.01, 0.03), (3e-4, 1e-3, 3e-3, 1e-2)),
}
"""LRs of Muon and of AdamW, by whose Muon it is."""
Batch: TypeAlias = "tuple[Tensor, Tensor]"
Task: TypeAlias = "tuple[nn.Module, Callable[[], Batch], Batch, Callable[[Tensor, Tensor], Tensor]]"
"""A model, what draws its batches, the test set, and the loss."""


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def classes(seed: int) -> Task:
    shape: dict[str, Any] = {"n_features": 20, "n_informative": 12, "n_classes": 6, "n_clusters_per_class": 3}
    values, labels = make_classification(4000, **shape, random_state=seed)
    x, y = torch.tensor(values, dtype=torch.float32), torch.tensor(labels)
    return perceptron(20, 6), _drawn(x, y), (x[3000:], y[3000:]), nn.functional.cross_entropy


def friedman(seed: int) -> Task:
    values, targets = make_friedman2(4000, noise=50.0, random_state=seed)
    x, y = torch.tensor(values, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)[:, None]
    x, y = ((v - v[:3000].mean(0)) / v[:3000].std(0) for v in (x, y))
    return perceptron(4, 1), _drawn(x, y), (x[3000:], y[3000:]), nn.functional.mse_loss


def _drawn(x: Tensor, y: Tensor) -> Callable[[], Batch]:
    def batch() -> Batch:
        index = torch.randint(3000, (64,))
        return x[index], y[index]

    return batch


TASKS: Final = {"classes": (classes, 500), "friedman": (friedman, 500)}
"""What makes a task, and how many steps a run has."""


def optimizers(model: nn.Module, kind: str, lrs: tuple[float, float]) -> list[Optimizer]:
    """Muon for the matrices between input and output, AdamW for all else, as Muon's authors divide them."""
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2]
    hidden = {name for name in matrices if name != matrices[-1]}
    of_muon = [p for name, p in model.named_parameters() if name in hidden]
    of_adamw = [p for name, p in model.named_parameters() if name not in hidden]
    muon = torch.optim.Muon(of_muon, lr=lrs[0]) if kind == "torch" else Muon(of_muon, lr=lrs[0], weight_decay=0.01)
    return [muon, torch.optim.AdamW(of_adamw, lr=lrs[1], weight_decay=0.01)]


def run(task: str, kind: str, seed: int, lrs: tuple[float, float] | None) -> dict[str, Any]:
    """One run: a cosine from the LRs, or AutoWU."""
    make, steps = TASKS[task]
    torch.manual_seed(seed)
    model, batch, (test_x, test_y), criterion = make(seed)
    both = optimizers(model, kind, lrs or (0.01, 1e-3))
    scheduler = AutoWU(both, total_steps=steps, model=model) if lrs is None else None
    warmup = max(1, round(0.05 * steps))
    for step in range(steps):
        if lrs is not None:
            decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
            for optimizer, lr in zip(both, lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, decay)
        x, y = batch()
        loss = criterion(model(x), y)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in both:
            optimizer.step()
        if scheduler is not None:
            scheduler.step(loss)
    with torch.no_grad():
        test_loss = criterion(model.eval()(test_x), test_y).item()
    found = scheduler.switch.lrs if scheduler is not None and scheduler.switch is not None else lrs
    return {
        "task": task,
        "muon": kind,
        "seed": seed,
        "method": "autowu" if lrs is None else "grid",
        "lrs": found,
        "loss": test_loss,
    }


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the docs: AutoWU's test loss over that of the best pair, and both pairs; means over the seeds."""
    lines = ["| task | Muon | best pair of the grid | AutoWU's pairs | test loss, best pair | test loss, AutoWU | ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    ratios = []
    for task, kind in product(TASKS, GRID):
        of_case = [row for row in rows if (row["task"], row["muon"]) == (task, kind)]
        losses: dict[tuple[float, float], list[float]] = {}
        for row in of_case:
            if row["method"] == "grid":
                losses.setdefault(tuple(row["lrs"]), []).append(row["loss"] if math.isfinite(row["loss"]) else math.inf)
        found = [row for row in of_case if row["method"] == "autowu"]
        means = {lrs: statistics.fmean(values) for lrs, values in losses.items() if len(values) == len(SEEDS)}
        if len(found) < len(SEEDS) or len(means) < math.prod(map(len, GRID[kind])):
            continue
        best = min(means, key=lambda lrs: means[lrs])
        own = statistics.fmean(row["loss"] for row in found)
        ratios.append(own / means[best])
        pairs = "; ".join(" and ".join(f"{lr:.2g}" for lr in row["lrs"]) for row in found)
        told = f"{best[0]:g} and {best[1]:g} | {pairs} | {means[best]:.3f} | {own:.3f} | {ratios[-1]:.2f}"
        lines.append(f"| {task} | {kind} | {told} |")
    if ratios:
        lines += ["", f"geometric mean of the ratios: {statistics.geometric_mean(ratios):.2f}, worst {max(ratios):.2f}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--most", type=int, default=10**6, help="runs that are made at most, of those that are missing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    had = {(row["task"], row["muon"], row["seed"], tuple(row["lrs"]) if row["method"] == "grid" else None) for row in rows}
    wanted = [
        (task, kind, seed, lrs) for task in args.tasks for kind in GRID for seed in SEEDS for lrs in (*product(*GRID[kind]), None)
    ]
    with args.out.open("a") as out:
        for case in [case for case in wanted if case not in had][: args.most]:
            rows.append(run(*case))
            print(json.dumps(rows[-1]), file=out, flush=True)
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
