"""Does a held-out loss that is passed tell of an LR that is too high where the training loss cannot?

    python benchmarks/held_out.py [--cases diabetes notes] [--seeds 3 4] [--minutes 3.5]
    python benchmarks/held_out.py --report [--seeds 3 4]

One half of a task's test set is held out and seen by the run, the other half judges it. ``default`` is AutoWU(optimizer,
total_steps=..., model=model). ``observed`` is the same with scheduler.observe_validation(loss) at every hundredth of the run, and
``observed 20 times`` at every twentieth. ``grid`` is a cosine at one of some LRs. Beside the loss at the end there is that of the
weights whose held-out loss was the lowest of a hundred looks, as one keeps who stops early.

Three tasks are small and overfit, four do not. A run is a line of JSON in results/held_out.jsonl; those that are there are not run
again. The report takes the test loss over that of the best LR of the grid, picked afterwards, or over the default's, where there is
no grid.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measures import geometric_mean
from peers import cosine
from probes import halves
from regret import Case, read
from tasks import make_optimizer, make_task

from autowu import AutoWU

RESULTS = Path(__file__).parent / "results" / "held_out.jsonl"
GRIDS: dict[str, tuple[float, ...]] = {
    "diabetes adamw 32 600": (1e-4, 3e-4, 1e-3, 3e-3),
    "cancer sgd 32 600": (1e-3, 3e-3, 1e-2, 3e-2),
    "notes adamw 16 300": (1e-4, 3e-4, 1e-3, 3e-3),
    "few sgd 16 200": (),
    "adapters adamw 16 200": (),
    "mlp rmsprop 64 300": (),
    "mlp adagrad 64 300": (),
}
"""The cases, and the LRs around the best of those that overfit."""
METHODS = {"default": 0, "observed": 100, "observed 20 times": 20}


def run(name: str, method: str, lr: float | None, seed: int) -> dict[str, Any]:
    """One run; the line of the results file."""
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, lr or 1.0)
    judged_by, held_out = halves(task)
    scheduler: Any = cosine(optimizer, case.steps, round(0.05 * case.steps))
    if lr is None:
        scheduler = AutoWU(optimizer, total_steps=case.steps, model=model)
    looks, batches = METHODS.get(method, 0), task.batches(case.batch_size, seed)
    lowest, best = math.inf, math.nan
    for step in range(1, case.steps + 1):
        inputs, targets = next(batches)
        loss = task.loss(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % (case.steps // 100) == 0:
            seen = task.evaluate(model, held_out)[0]
            if looks and step % (case.steps // looks) == 0:
                scheduler.observe_validation(seen)
            if seen < lowest:
                lowest, best = seen, task.evaluate(model, judged_by)[0]
        scheduler.step(*([loss.detach()] if lr is None else []))
    facts: dict[str, Any] = {"case": name, "method": method, "lr": lr, "seed": seed}
    facts |= {"test_loss": task.evaluate(model, judged_by)[0], "stopped_early": best}
    if lr is None:
        facts |= {"found_lr": scheduler.switch.lr, "events": [event.kind for event in scheduler.events]}
    return facts


def jobs(cases: list[str], seeds: list[int]) -> Iterator[tuple[str, str, float | None, int]]:
    for seed in seeds:
        for case in cases:
            yield from ((case, method, None, seed) for method in METHODS)
            yield from ((case, "grid", lr, seed) for lr in GRIDS[case])


def report(rows: list[dict[str, Any]]) -> str:
    """The table, of geometric means over the seeds."""
    lines = ["| case | " + " | ".join(METHODS) + " | default, stopped early | grid, stopped early | lowered |", "|---" * 7 + "|"]
    for case in GRIDS:
        mine = [row for row in rows if row["case"] == case]
        seeds = [s for s in sorted({r["seed"] for r in mine}) if METHODS.keys() <= {r["method"] for r in mine if r["seed"] == s}]
        if not seeds:
            continue
        bar, grid_stopped = {}, []
        of = {(row["method"], row["seed"]): row for row in mine if row["lr"] is None}
        for seed in seeds:
            grid = [row for row in mine if row["seed"] == seed and row["method"] == "grid"]
            bar[seed] = min((row["test_loss"] for row in grid), default=of["default", seed]["test_loss"])
            grid_stopped += [min(row["stopped_early"] for row in grid) / bar[seed]] if grid else []
        cells = [f"{geometric_mean(of[m, s]['test_loss'] / bar[s] for s in seeds):.2f}" for m in METHODS]
        cells.append(f"{geometric_mean(of['default', s]['stopped_early'] / bar[s] for s in seeds):.2f}")
        cells.append(f"{geometric_mean(grid_stopped):.2f}" if grid_stopped else "")
        cells.append(", ".join(str(of["observed", s]["events"].count("overfitting")) for s in seeds))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="those that contain it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    cases = [case for case in GRIDS if args.cases is None or any(pattern in case for pattern in args.cases)]
    rows, started = copy.copy(read(RESULTS)), time.perf_counter()
    done = {(row["case"], row["method"], row["lr"], row["seed"]) for row in rows}
    for job in jobs(cases, args.seeds):
        if job not in done and not args.report and time.perf_counter() - started < 60 * args.minutes:
            rows.append(run(*job))
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(report([row for row in rows if row["seed"] in args.seeds and row["case"] in cases]))


if __name__ == "__main__":
    main()
