"""What it brings to pass by a run whose loss has leapt up and falls again in the warm-up, and not to copy it.

    python benchmarks/passed_by.py [--seeds 12 13] [--shard 1/2] [--minutes 10]
    python benchmarks/passed_by.py --report

The cases are those of the suites `cpu`, `hard`, `plateaus` and `long` of regret.py. A run in which nothing was passed by is stopped
at its switch: it is the same with either rule. Of the others both are trained to the end, on the same batches, and the report takes
test losses as ratios to that of the rule before, which copies whatever falls. Seeds 0 to 11 had a part in the rule.

A case with a seed is a line of JSON in results/passed_by.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from by_case import command
from measures import FLOOR, geometric_mean
from probes import _finite
from regret import CASES, Case
from tasks import make_optimizer, make_task

from autowu import AutoWU
from autowu.rollback import Rollback
from autowu.watch import LossWatch

RESULTS = Path(__file__).parent / "results" / "passed_by.jsonl"
SUITES = ("cpu", "hard", "plateaus", "long")
TRIED = tuple(dict.fromkeys(case for suite in SUITES for case in CASES[suite] if not case.startswith("sounds")))
SEEDS = (12, 13, 14, 15, 16, 17)
AT_BEST = LossWatch.at_best


def train(name: str, seed: int) -> float | None:
    """Test loss of a run with AutoWU; None, from the switch on, where nothing was passed by."""
    case = Case.parse(name)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    scheduler = AutoWU(optimizer, total_steps=case.steps, model=model)
    with mock.patch.object(Rollback, "pass_by", autospec=True, side_effect=Rollback.pass_by) as passed_by:
        for loss in task.steps(model, optimizer, case.batch_size, seed, case.steps):
            scheduler.step(loss)
            if scheduler.switch is not None and not passed_by.called and LossWatch.at_best is AT_BEST:
                return None
    return task.evaluate(model, task.test)[0]


def run(name: str, seed: int) -> dict[str, Any]:
    """Test losses with the rule and with that before; a line of the results file."""
    now = train(name, seed)
    before = None
    if now is not None:
        with mock.patch.object(LossWatch, "at_best", True):
            before = train(name, seed)
    return {"case": name, "seed": seed, "before": before, "now": now}


def report(rows: list[dict[str, Any]]) -> str:
    """The table of the docs: the runs that differ."""
    changed = {}
    for row in rows:
        if row["now"] is not None:
            ratio = max(FLOOR, _finite(row["now"])) / max(FLOOR, _finite(row["before"]))
            if ratio != 1:
                changed[row["case"], row["seed"]] = ratio
    if not changed:
        return f"of {len(rows)} runs none differs"
    ratios = sorted(changed.values())
    told = (
        f"of {len(rows)} runs {len(changed)} differ: {geometric_mean(ratios):.2f} of the test loss in the mean, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}; {sum(ratio < 1 for ratio in ratios)} are better"
    )
    cases = Counter(case for case, _ in changed)
    lines = [
        f"| {case} | {count} | {geometric_mean([r for (c, _), r in changed.items() if c == case]):.2f} |"
        for case, count in cases.most_common()
    ]
    return "\n".join([told, "", "| case | runs that differ | test loss over that before |", "|---|---|---|", *lines])


if __name__ == "__main__":
    command(__doc__, RESULTS, TRIED, SEEDS, run, report)
