"""What a variant of AutoWU reached beside the grid: numbers and tables from the lines of the results files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["FLOOR", "Outcome", "best_of_grid", "geometric_mean", "outcomes", "table"]

FLOOR = 1e-4
"""A loss below this is none: ratios of smaller ones say nothing."""

Row = dict[str, Any]
Best = dict[tuple[str, int], tuple[float, float]]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def best_of_grid(grid: Iterable[Row]) -> Best:
    """The lowest test loss of the grid and its LR, by case and seed."""
    best: Best = {}
    for row in grid:
        if row["method"] == "grid" and row["finite"]:
            key = row["case"], row["seed"]
            best[key] = min(best.get(key, (math.inf, math.inf)), (max(row["test_loss"], FLOOR), row["lr"]))
    return best


@dataclass(frozen=True)
class Outcome:
    """A run beside the grid.

    Attributes:
        ratio: test loss over the best of the grid on that seed; infinite where the run ended non-finite.
        lr: with which the cooldown began, or that of the switch; None where there was neither.
    """

    case: str
    seed: int
    method: str
    ratio: float
    lr: float | None
    best_lr: float
    switch_step: int | None

    @property
    def decades(self) -> float | None:
        """Of LR, from the grid's best; below it is negative."""
        return None if self.lr is None else math.log10(self.lr / self.best_lr)

    def __str__(self) -> str:
        off = "" if self.decades is None else f"  lr {self.lr:.2g}  best {self.best_lr:.2g}  {self.decades:+.2f} decades"
        return f"{self.case:24}  seed {self.seed}  {self.method}  ratio {self.ratio:.2f}{off}  switch {self.switch_step}"


def outcomes(rows: Iterable[Row], best: Best) -> list[Outcome]:
    """The runs of `rows` whose grid is known."""
    found = []
    for row in rows:
        key = row["case"], row["seed"]
        if row["method"] != "grid" and key in best:
            loss, best_lr = best[key]
            ratio = max(row["test_loss"], FLOOR) / loss if row["finite"] else math.inf
            lr = row.get("cooldown_lr") or row.get("found_lr")
            found.append(Outcome(*key, row["method"], ratio, lr, best_lr, row.get("switch_step")))
    return found


def _cells(runs: list[Outcome]) -> list[str]:
    """Mean, worst case, worst run, LRs far off, non-finite ones, share of the run in the warm-up."""
    by_case: dict[str, list[float]] = {}
    for run in runs:
        by_case.setdefault(run.case, []).append(run.ratio)
    cases = {case: geometric_mean(ratios) for case, ratios in by_case.items()}
    off = [abs(run.decades) for run in runs if run.decades is not None]
    shares = [run.switch_step / int(run.case.split()[-1]) for run in runs if run.switch_step is not None]
    return [
        *(f"{len(cases)}", f"{len(runs)}", f"{geometric_mean(cases.values()):.3f}"),
        *(f"{max(cases.values()):.2f}", f"{max(run.ratio for run in runs):.2f}"),
        *(f"{sum(d > 0.5 for d in off)}", f"{sum(d > 1 for d in off)}"),
        *(f"{sum(math.isinf(run.ratio) for run in runs)}", f"{statistics.fmean(shares):.0%}" if shares else ""),
    ]


def table(found: list[Outcome], common: bool = False) -> str:
    """Markdown: a row a method, then a row a case; `common` takes only the cases and seeds that all methods have."""
    methods = list(dict.fromkeys(run.method for run in found))
    if common:
        shared = set.intersection(*({(run.case, run.seed) for run in found if run.method == m} for m in methods))
        found = [run for run in found if (run.case, run.seed) in shared]
    heads = ("cases", "runs", "test loss", "worst case", "worst run", "over half a decade", "over one", "non-finite", "warm-up")
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method in methods:
        if runs := [run for run in found if run.method == method]:
            lines.append(f"| {method} | {' | '.join(_cells(runs))} |")
    lines += ["", f"| case: ratio, decades of LR | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for case in dict.fromkeys(run.case for run in found):
        cells = []
        for method in methods:
            runs = [run for run in found if (run.case, run.method) == (case, method)]
            off = [run.decades for run in runs if run.decades is not None]
            ratio = f"{geometric_mean(run.ratio for run in runs):.2f}" if runs else ""
            cells.append(ratio + (f" {statistics.fmean(off):+.1f}" if off else ""))
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)
