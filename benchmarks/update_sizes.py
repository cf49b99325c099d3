"""Does the size of an update tell which LRs are worth passing, better than the family of the optimizer?

    python benchmarks/update_sizes.py [--shard 1/2] [--minutes 10]
    python benchmarks/update_sizes.py --report

Each case of regret.py that has a grid takes 24 steps at the lowest LR of its family. By how much of their norm the weights move in
a step, over the LR, times the LR that is best in the grid, is the update there: the first one, and the median of the last eight.
The report has the spread of the best LRs, and of these updates, in decades. Cases of the suite `optimizers` need the package
`pytorch_optimizer`.

A case is a line of JSON in results/update_sizes.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from by_case import command
from regret import Case, grid_file, read
from tasks import make_optimizer, make_task

from autowu.families import family, lr_range

RESULTS = Path(__file__).parent / "results" / "update_sizes.jsonl"
SUITES = ("cpu", "hard", "plateaus", "kinds", "long", "optimizers")
STEPS = 24
LAST = 8


def best_lrs() -> dict[str, float]:
    """The LR that is best in the grid, by case: its geometric mean over the seeds."""
    losses: dict[tuple[str, int, str], dict[float, float]] = defaultdict(dict)
    for suite in SUITES:
        for row in read(grid_file(suite)):
            if row["method"] == "grid":
                losses[row["case"], row["seed"], suite][row["lr"]] = row["test_loss"] if row["finite"] else math.inf
    best = defaultdict(list)
    for (case, _, _), of in losses.items():
        best[case].append(math.log10(min(of, key=of.__getitem__)))
    return {case: 10 ** statistics.mean(each) for case, each in best.items()}


def run(name: str, seed: int) -> dict[str, Any]:
    """The updates of a case over its LR; a line of the results file."""
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    lr, _ = lr_range(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, shares = [p.detach().clone() for p in parameters], []
    for _ in task.steps(model, optimizer, case.batch_size, seed, STEPS):
        moved = sum((p.detach() - b).double().square().sum().item() for p, b in zip(parameters, before, strict=True))
        norm = sum(b.double().square().sum().item() for b in before)
        shares.append(math.sqrt(moved / norm) / lr)
        before = [p.detach().clone() for p in parameters]
    later = statistics.median(shares[-LAST:])
    return {"case": name, "seed": seed, "family": family(optimizer), "min_lr": lr, "first": shares[0], "later": later}


def report(rows: list[dict[str, Any]]) -> str:
    """The table of the docs."""
    best = best_lrs()
    lines = [
        "| family | cases | best LR | the first update there | later ones there |",
        "|---|---|---|---|---|",
    ]
    for name in ("sgd", "adam", "lars", "lamb", "unknown", "all"):
        own = [row for row in rows if name in (row["family"], "all")]
        spreads = []
        for over in (lambda _: 1.0, lambda row: row["first"], lambda row: row["later"]):
            decades = [math.log10(best[row["case"]] * over(row)) for row in own if over(row) > 0]
            spreads.append(statistics.stdev(decades))
        lines.append(f"| {name} | {len(own)} | " + " | ".join(f"{spread:.2f}" for spread in spreads) + " |")
    sizes = [math.log10(row["first"] * row["min_lr"]) for row in rows if row["family"] == "sgd"]
    told = f"The first update of SGD at `min_lr` is 1e{min(sizes):.1f} to 1e{max(sizes):.1f} of the weights' norm."
    return "\n".join([*lines, "", told])


if __name__ == "__main__":
    command(__doc__, RESULTS, best_lrs(), (0,), run, report)
