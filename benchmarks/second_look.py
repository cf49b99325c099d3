"""What the second look at the peak LR does where the peak is right, and where it is 4 and 16 times too low.

    python benchmarks/second_look.py [--cases net "friedman*sgd"] [--seeds 3 4] [--shard 1/2] [--minutes 3]
    python benchmarks/second_look.py --report

The cases are the long runs of probes_long.py and of the suite `long` of regret.py, and the same tasks at 1,000 steps. AutoWU runs
as it is, at shares of its `peak_factor`: 1, 1/4, 1/16. Each is run without ramps, with them, and with them but without `model=`, on
the same batches. What is reported is the test loss over that of the whole factor without ramps. Seeds 0 to 2 chose how a ramp goes,
3 and 4 nothing.

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
LOOKS = ("none", "second look", "without model")
SEEDS = (3, 4)
SHORT = 1_000


def run(name: str, seed: int, share: float, look: str) -> dict[str, Any]:
    """Train a case with AutoWU, at a share of its factor, with one of `LOOKS`; a line of the results file."""
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    usual = AutoWU(optimizer, total_steps=case.steps, rollback=False).config.peak_factor
    given = None if look == "without model" else model
    scheduler = AutoWU(optimizer, total_steps=case.steps, model=given, peak_factor=share * usual)
    with mock.patch("autowu.ramp.SHORTEST", math.inf if look == "none" else 0):
        for loss in task.steps(model, optimizer, case.batch_size, seed, case.steps):
            scheduler.step(loss)
    told = [event.message for event in scheduler.events if event.kind == "ramp"]
    assert scheduler.switch is not None
    raised = scheduler._state.raised
    test = task.evaluate(model, task.test, 2048)[0]
    found = {"lr": scheduler.switch.lr, "raised": raised, "ramps": len(told), "setbacks": scheduler._state.setbacks, "test": test}
    return {"case": name, "seed": seed, "share": share, "look": look} | found


def ratios(rows: list[dict[str, Any]]) -> dict[tuple[float, str], list[float]]:
    """Test losses over those of the whole factor without ramps, by share and look."""
    losses = {(r["case"], r["seed"], r["share"], r["look"]): max(FLOOR, _finite(r["test"])) for r in rows}
    table: dict[tuple[float, str], list[float]] = {}
    for (case, seed, share, look), loss in losses.items():
        if (whole := losses.get((case, seed, 1.0, "none"))) is not None:
            table.setdefault((share, look), []).append(min(CLIP**3, max(1 / CLIP, loss / whole)))
    return table


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of the long runs and of the short ones, of the seeds that chose nothing."""
    tables = []
    for is_short in (False, True):
        lines = ["| peak LR | ramps | test loss | worst | raised | by, median |", "|---" * 6 + "|"]
        of = [row for row in rows if row["seed"] in SEEDS and (Case.parse(row["case"]).steps == SHORT) == is_short]
        table = ratios(of)
        for share, look in product(SHARES, LOOKS):
            if (found := table.get((share, look))) is None:
                continue
            raised = [row["raised"] for row in of if row["look"] == look and row["share"] == share]
            higher = [factor for factor in raised if factor > 1]
            median = f"{statistics.median(higher):.1f}" if higher else ""
            name = "as found" if share == 1 else f"1/{1 / share:.0f}"
            told = "" if look == "none" else f"{len(higher)} of {len(raised)}"
            lines.append(f"| {name} | {look} | {geometric_mean(found):.2f} | {max(found):.2f} | {told} | {median} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="the K-th of N parts of what is to be run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    long = [*CASES, *MORE]
    cases = [*long, *(" ".join([*case.split()[:-1], str(SHORT)]) for case in long)]
    cases = [c for c in cases if any(fnmatch.fnmatch(c, f"{p}*") for p in args.cases)]
    rows, started = read(RESULTS), time.perf_counter()
    done = {(r["case"], r["seed"], r["share"], r["look"]) for r in rows}
    wanted = [key for key in product(cases, args.seeds, SHARES, LOOKS) if key not in done]
    shard, shards = map(int, args.shard.split("/"))
    for key in [] if args.report else wanted[shard - 1 :: shards]:
        if time.perf_counter() - started > 60 * args.minutes:
            break
        row = json.loads(json.dumps(run(*key)), parse_float=lambda x: float(f"{float(x):.6g}"))
        rows.append(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
