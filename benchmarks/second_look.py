"""What the second look at the peak LR does where the peak is right, and where it is 4 and 16 times too low.

    python benchmarks/second_look.py [--cases net "friedman*sgd"] [--seeds 3 4] [--minutes 3]
    python benchmarks/second_look.py --report

The cases are the long runs of probes_long.py and of the suite `long` of regret.py, with AutoWU as it is, at shares of its
`peak_factor`: 1, 1/4, 1/16. Each is run with ramps and without, on the same batches. What is reported is the test loss over that of
the whole factor without ramps. Seed 0 chose the thresholds of a ramp; 3 and 4 chose nothing of it.

A run is a line of JSON in results/second_look.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import math
import os
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measures import FLOOR, geometric_mean
from probes import CLIP, _finite
from probes_long import CASES
from regret import Case, read
from tasks import make_optimizer, make_task

from autowu import AutoWU

RESULTS = Path(__file__).parent / "results" / "second_look.jsonl"
MORE = ("mlp sgd 32 4000", "ripples sgd 64 5000", "checkers sgd 64 4000", "cancer sgd 32 4000")
SHARES = (1.0, 0.25, 0.0625)
CHOOSING, REPORTED = (0,), (3, 4)


def run(name: str, seed: int, share: float, ramps: bool) -> dict[str, Any]:
    """Train a case with AutoWU, at a share of its factor; a line of the results file."""
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    usual = AutoWU(optimizer, total_steps=case.steps, rollback=False).config.peak_factor
    scheduler = AutoWU(optimizer, total_steps=case.steps, model=model, peak_factor=share * usual)
    with mock.patch("autowu.ramp.SHORTEST", 0 if ramps else math.inf):
        for loss in task.steps(model, optimizer, case.batch_size, seed, case.steps):
            scheduler.step(loss)
    told = [event.message for event in scheduler.events if event.kind == "ramp"]
    assert scheduler.switch is not None
    raised = scheduler._state.raised
    test = task.evaluate(model, task.test, 2048)[0]
    found = {"lr": scheduler.switch.lr, "raised": raised, "ramps": len(told), "setbacks": scheduler._state.setbacks, "test": test}
    return {"case": name, "seed": seed, "share": share, "with": ramps} | found


def ratios(rows: list[dict[str, Any]], seeds: tuple[int, ...]) -> dict[tuple[float, bool], dict[tuple[str, int], float]]:
    """Test loss over that of the whole factor without ramps, by share and whether with ramps, by case and seed."""
    losses = {(r["case"], r["seed"], r["share"], r["with"]): max(FLOOR, _finite(r["test"])) for r in rows}
    table: dict[tuple[float, bool], dict[tuple[str, int], float]] = {}
    for (case, seed, share, ramps), loss in losses.items():
        if seed in seeds and (case, seed, 1.0, False) in losses:
            ratio = loss / losses[case, seed, 1.0, False]
            table.setdefault((share, ramps), {})[case, seed] = min(CLIP**3, max(1 / CLIP, ratio))
    return table


def report(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| seeds | peak LR | without | worst | with a second look | worst | raised | by, median |", "|---" * 8 + "|"]
    for seeds in (CHOOSING, REPORTED):
        table = ratios(rows, seeds)
        for share in SHARES:
            without, looked = (list(table.get((share, ramps), {}).values()) for ramps in (False, True))
            if not without or not looked:
                continue
            of = [r for r in rows if r["with"] and r["share"] == share and r["seed"] in seeds]
            raised = [r["raised"] for r in of if r["raised"] > 1]
            median = f"{statistics.median(raised):.1f}" if raised else ""
            numbers = [f"{f(v):.2f}" for v in (without, looked) for f in (geometric_mean, max)]
            name = "as found" if share == 1 else f"1/{1 / share:.0f}"
            lines.append(
                f"| {', '.join(map(str, seeds))} | {name} | {' | '.join(numbers)} | {len(raised)} of {len(of)} | {median} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*CHOOSING, *REPORTED])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    cases = [c for c in (*CASES, *MORE) if any(fnmatch.fnmatch(c, f"{p}*") for p in args.cases)]
    rows, started = read(RESULTS), time.perf_counter()
    done = {(r["case"], r["seed"], r["share"], r["with"]) for r in rows}
    for key in product(cases, args.seeds, SHARES, (False, True)):
        if key not in done and not args.report and time.perf_counter() - started < 60 * args.minutes:
            row = json.loads(json.dumps(run(*key)), parse_float=lambda x: float(f"{float(x):.6g}"))
            rows.append(row)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
