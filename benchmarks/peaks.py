"""Would another peak LR, or another decay, do better in the mean?

    python benchmarks/peaks.py [--cases vit "mlp*lion"] [--seeds 1] [--shard 1/2] [--minutes 10]
    python benchmarks/peaks.py --report

AutoWU trains a case of the suites `cpu`, `hard` and `plateaus` of regret.py up to its switch. From there it goes on to the end of
the run with multiples of its peak and with several decays, always from the same copy and on the same batches, without the watch.
The report takes test losses as ratios to that of AutoWU's own peak and decay. A ratio counts as 4 at most and a quarter at least.
Seeds 0 and 1 have had a part in the rule.

A case with a seed is a line of JSON in results/peaks.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import math
import os
import statistics
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from by_case import command
from measures import FLOOR
from probes import CLIP, Run, _finite
from regret import CASES

from autowu.phases import cooldown_begin

RESULTS = Path(__file__).parent / "results" / "peaks.jsonl"
SUITES = ("cpu", "hard", "plateaus")
LEFT_OUT = ("sounds adamw 32 300", "vit sgd 32 1000", "net adamw 32 5000", "net sgd 32 10000", "deep sgd 64 1000")
"""For a package, for their time, and one that learns nothing at any of these LRs."""
MULTIPLES = (0.5, 1.0, 1.4, 2.0, 2.8)
TRIED = tuple(case for suite in SUITES for case in CASES[suite] if case not in LEFT_OUT)
SEEDS = (0, 1)
DECAYS = ("own", "linear", "power 1.5", "power 2")
"""AutoWU's own, held and then linear; linear from the switch on; and powers of that."""


def lrs(run: Run, decay: str, multiple: float) -> list[float]:
    """The LR of each step from the switch on."""
    switch, total = run.switch, run.case.steps
    begin = cooldown_begin(run.config, switch) if decay == "own" else switch.step
    power = float(decay.split()[1]) if decay.startswith("power") else 1.0
    return [multiple * switch.lr * min(1.0, (total - step) / (total - begin)) ** power for step in range(switch.step, total)]


def run(name: str, seed: int) -> dict[str, Any]:
    """All that is tried on a case; a line of the results file."""
    a_run, ends = Run(name, seed), {}
    for decay, multiple in product(DECAYS, MULTIPLES):
        a_run.train(lrs(a_run, decay, multiple), seed + 1000)
        ends[f"{decay}, {multiple:g}"] = _finite(a_run.task.evaluate(a_run.model, a_run.task.test)[0])
    return {"case": name, "seed": seed, "lr": a_run.switch.lr, "step": a_run.switch.step, "ends": ends}


def report(rows: list[dict[str, Any]]) -> str:
    """The table: geometric means over the cases, with their standard errors, and the worst case; then what nobody could choose."""

    def logs(key: str) -> dict[str, float]:
        """By case, of what goes by that key."""
        by_case: dict[str, list[float]] = {}
        for row in rows:
            end, own = (max(FLOOR, row["ends"][which]) for which in (key, "own, 1"))
            by_case.setdefault(row["case"], []).append(math.log(min(CLIP, max(1 / CLIP, end / own))))
        return {case: statistics.fmean(of_case) for case, of_case in by_case.items()}

    lines = [f"| decay | {' | '.join(f'{m:g} of the peak' for m in MULTIPLES)} |", "|---" * (1 + len(MULTIPLES)) + "|"]
    for decay in DECAYS:
        cells = []
        for multiple in MULTIPLES:
            values = [*logs(f"{decay}, {multiple:g}").values()]
            mean, worst = math.exp(statistics.fmean(values)), math.exp(max(values))
            error = mean * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append("1" if (decay, multiple) == ("own", 1.0) else f"{mean:.2f} ± {error:.2f}, {worst:.1f}")
        lines.append(f"| {decay} | {' | '.join(cells)} |")
    of_own = [logs(f"own, {multiple:g}") for multiple in MULTIPLES]
    best = math.exp(statistics.fmean(min(of[case] for of in of_own) for case in of_own[0]))
    return "\n".join([*lines, "", f"Of its own decay, the multiple that is best for each case, picked afterwards: {best:.2f}."])


if __name__ == "__main__":
    command(__doc__, RESULTS, TRIED, SEEDS, run, report)
