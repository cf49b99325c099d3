"""How often does the watch set a run back that would have done as well without, and what do looks at the peak bring?

    python benchmarks/false_setbacks.py [--seeds 100 101] [--shard 1/2] [--minutes 10]
    python benchmarks/false_setbacks.py --report

A thousand short runs: the cases of regret.py whose run takes some three seconds at most, on seeds of their own, which chose
nothing. Nothing is done to these runs. One that was set back after its switch is trained again without set-backs, on the same
batches. It was set back falsely if it ends with a higher training loss than that twin (mean of the last tenth of the steps). One
that looked at its peak LR again is trained without such ramps, too, and the test losses are compared. By seeds 100 to 107 it was
seen what noise should keep from a ramp; they are not in the report of ramps.

A run is a line of JSON in results/false_setbacks.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from by_case import command
from measures import FLOOR, geometric_mean
from probes import CLIP, _finite
from regret import CASES, Case
from tasks import make_optimizer, make_task

from autowu import AutoWU
from autowu.watch import LossWatch

RESULTS = Path(__file__).parent / "results" / "false_setbacks.jsonl"
SLOW = ("lm", "resnet", "cnn adamp", "cnn adamw 32", "cnn l", "gru", "vit sgd 32 1000", "sounds", "net adamw", "net sgd", "adding")
FAST = tuple(case for suite in ("cpu", "hard", "plateaus") for case in CASES[suite] if not case.startswith(SLOW))
SEEDS = tuple(range(100, 131))
OF_RAMPS = SEEDS[8:]
SAME = 0.02
"""By which two losses differ at most that count as the same."""


def train(name: str, seed: int) -> dict[str, Any]:
    """A run with AutoWU; what it ended with, and what befell it after its switch."""
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    scheduler = AutoWU(optimizer, total_steps=case.steps, model=model)
    losses = []
    for loss in task.steps(model, optimizer, case.batch_size, seed, case.steps):
        losses.append(loss)
        scheduler.step(loss)
    assert scheduler.switch is not None
    after = [event.kind for event in scheduler.events if event.step > scheduler.switch.step]
    train_loss, test_loss = statistics.fmean(losses[-max(1, case.steps // 10) :]), task.evaluate(model, task.test)[0]
    finite = math.isfinite(train_loss) and math.isfinite(test_loss)
    found = {"lr": scheduler.switch.lr, "finite": finite, "train": _finite(train_loss), "test": _finite(test_loss)}
    raised = scheduler._state.raised
    return found | {"events": after} | ({"raised": raised} if raised > 1 else {})


def run(name: str, seed: int) -> dict[str, Any]:
    """A run, and its twins without set-backs and without ramps where it had some; a line of the results file."""
    watched, twin, flat = train(name, seed), None, None
    if "divergence" in watched["events"]:
        with mock.patch.object(LossWatch, "diverged", False):
            twin = train(name, seed)
    if "ramp" in watched["events"]:
        with mock.patch("autowu.ramp.SHORTEST", math.inf):
            flat = train(name, seed)
    return {"case": name, "seed": seed, "watched": watched, "twin": twin, "flat": flat}


def report_of_ramps(rows: list[dict[str, Any]]) -> str:
    """What ramps brought, by case: test losses over those without, geometric means, and their error over the cases."""
    lines = ["| case | runs | with ramps | worst | raised | these alone | worst | the others |", "|---" * 8 + "|"]
    looked = [row for row in rows if row.get("flat") is not None and row["seed"] in OF_RAMPS]
    by_case = {case: [row for row in looked if row["case"] == case] for case in dict.fromkeys(row["case"] for row in looked)}
    logs: list[float] = []
    for case, of in [*by_case.items(), ("all", looked)] if looked else []:
        ratios: dict[bool, list[float]] = {True: [], False: []}
        for row in of:
            with_ramps, without = (max(FLOOR, row[which]["test"]) for which in ("watched", "flat"))
            ratios["raised" in row["watched"]].append(min(CLIP, max(1 / CLIP, with_ramps / without)))
        every, raised = ratios[True] + ratios[False], ratios[True]
        mean, error = geometric_mean(every), ""
        if case == "all" and len(logs) > 1:
            mean = math.exp(statistics.fmean(logs))
            error = f" ± {mean * statistics.stdev(logs) / math.sqrt(len(logs)):.2f}"
        logs.append(math.log(mean))
        told = [f"{mean:.2f}{error}", f"{max(every):.2f}", str(len(raised))]
        told += [f"{geometric_mean(raised):.2f}", f"{max(raised):.2f}"] if raised else ["", ""]
        told.append(f"{geometric_mean(ratios[False]):.2f}" if ratios[False] else "")
        lines.append(f"| {case} | {len(of)} | {' | '.join(told)} |")
    return "\n".join(lines)


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
    lines = [told, "", "| case | seed | training loss over that without set-backs | test loss |", "|---|---|---|---|"]
    for row, (train, test) in zip(back, ratios, strict=True):
        lines.append(f"| {row['case']} | {row['seed']} | {train:.2f} | {test:.2f} |")
    return "\n".join(lines) + "\n\n" + report_of_ramps(rows)


if __name__ == "__main__":
    command(__doc__, RESULTS, FAST, SEEDS, run, report)
