"""How often does the watch set a run back that would have done as well without?

    python benchmarks/false_setbacks.py [--seeds 100 101] [--shard 1/2] [--minutes 10]
    python benchmarks/false_setbacks.py --report

A thousand short runs: the cases of regret.py whose run takes some three seconds at most, on seeds of their own, which chose
nothing. Nothing is done to these runs. One that was set back after its switch is trained again without the watch, on the same
batches. It was set back falsely if it ends with a higher training loss than that twin (mean of the last tenth of the steps).

A run is a line of JSON in results/false_setbacks.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from by_case import command
from measures import FLOOR
from probes import _finite
from regret import CASES, Case
from tasks import make_optimizer, make_task

from autowu import AutoWU

RESULTS = Path(__file__).parent / "results" / "false_setbacks.jsonl"
SLOW = ("lm", "resnet", "cnn adamp", "cnn adamw 32", "cnn l", "gru", "vit sgd 32 1000", "sounds", "net adamw", "net sgd", "adding")
FAST = tuple(case for suite in ("cpu", "hard", "plateaus") for case in CASES[suite] if not case.startswith(SLOW))
SEEDS = tuple(range(100, 131))
SAME = 0.02
"""By which two losses differ at most that count as the same."""


def train(name: str, seed: int, watch: bool) -> dict[str, Any]:
    """A run with AutoWU; what it ended with, and what befell it after its switch."""
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    scheduler = AutoWU(optimizer, total_steps=case.steps, model=model, watch=watch)
    losses = []
    for loss in task.steps(model, optimizer, case.batch_size, seed, case.steps):
        losses.append(loss)
        scheduler.step(loss)
    assert scheduler.switch is not None
    after = [event.kind for event in scheduler.events if event.step > scheduler.switch.step]
    train_loss, test_loss = statistics.fmean(losses[-max(1, case.steps // 10) :]), task.evaluate(model, task.test)[0]
    finite = math.isfinite(train_loss) and math.isfinite(test_loss)
    found = {"lr": scheduler.switch.lr, "finite": finite, "train": _finite(train_loss), "test": _finite(test_loss)}
    return found | {"events": after}


def run(name: str, seed: int) -> dict[str, Any]:
    """A run, and its twin without the watch where it was set back; a line of the results file."""
    watched = train(name, seed, watch=True)
    twin = train(name, seed, watch=False) if "divergence" in watched["events"] else None
    return {"case": name, "seed": seed, "watched": watched, "twin": twin}


def report(rows: list[dict[str, Any]]) -> str:
    """What the docs say: the runs that were set back, and what it did to them."""
    back = [row for row in rows if row["twin"] is not None]
    ratios = [tuple(max(FLOOR, row["watched"][kind]) / max(FLOOR, row["twin"][kind]) for kind in ("train", "test")) for row in back]
    lost = sum(not row["watched"]["finite"] for row in rows)
    lower, higher = sum(train < 1 - SAME for train, _ in ratios), sum(train > 1 + SAME for train, _ in ratios)
    told = (
        f"Of {len(rows):,} runs {lost} ended non-finite. {len(back)} were set back: {lower} ended lower by it, {higher} higher, "
        f"{len(back) - lower - higher} the same."
    )
    lines = [told, "", "| case | seed | training loss over that without the watch | test loss |", "|---|---|---|---|"]
    for row, (train, test) in zip(back, ratios, strict=True):
        lines.append(f"| {row['case']} | {row['seed']} | {train:.2f} | {test:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, RESULTS, FAST, SEEDS, run, report)
