"""What a method reached beside the grid: numbers and tables from the lines of the results files.

- *Test loss*: over the best of the grid on that seed, geometric mean over the cases; behind it the standard error over the seeds.
- *Over half a decade*: LRs that are so far from the grid's best on that seed; in brackets, so far outside the range of those whose
  loss is at most a tenth higher.
- *Against*: that over another method's on the same runs; the standard error is over the cases, each the mean of its seeds.
- *Steps*: the share of the run after which a tuned run, one with the LR that is best over all seeds of the grid and a schedule for
  that length, is as good. From runs at some lengths, straight in the logarithm of the loss between them; 0.5 and 1.2 are the ends.
- *Profile*, as AlgoPerf has it: the time to a target is the share of the run after which the test loss first is as low, in
  twentieths from the half on; never is infinite. A method's score is the share of its runs whose time is within a factor of the
  best method's, averaged over factors from 1 to 4. The target of a case is the median over the seeds of a tuned run's last loss.
  The standard error of a score is over the seeds, that of a difference over the cases, each the mean of its seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    *("FLOOR", "LOOKS", "NAMES", "TUNED", "Outcome", "beside_peers", "best_of_grid", "freeze", "geometric_mean", "outcomes"),
    *("profile", "sweep", "table", "tuned_lrs"),
]

FLOOR = 1e-4
"""A loss below this is none: ratios of smaller ones say nothing."""
LOOKS = tuple(k / 20 for k in range(10, 21))
"""Shares of a run after which its test loss is looked at."""
LONGEST_FACTOR = 4.0
"""Of the performance profile."""
TUNED = "tuned 1.0"
"""A tuned run of the case's own length."""
NAMES = {
    "default": "AutoWU",
    "schedule-free": "Schedule-Free",
    "adalrs": "AdaLRS",
    "greedy": "GreedyLR",
    "plateau": "ReduceLROnPlateau after a range test",
    "prodigy": "Prodigy",
    "onecycle": "OneCycleLR after a range test",
    "d-adaptation": "D-Adaptation",
}
"""What the docs call a method."""

Row = dict[str, Any]
BAND = 1.1
"""Test loss over the best, up to which an LR counts as good."""


class Best(NamedTuple):
    """Of the grid on a seed: the lowest test loss, its LR, and the LRs around it that are about as good."""

    loss: float
    lr: float
    low: float
    high: float


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def _by_case_and_lr(grid: Iterable[Row]) -> dict[str, dict[float, dict[int, float]]]:
    """Test losses of the grid, by case, LR and seed; infinite where a run ended non-finite."""
    losses: dict[str, dict[float, dict[int, float]]] = {}
    for row in grid:
        if row["lr"] is None:  # another method's, in a file of all
            continue
        loss = max(row["test_loss"], FLOOR) if row["finite"] else math.inf
        losses.setdefault(row["case"], {}).setdefault(row["lr"], {})[row["seed"]] = loss
    return losses


def best_of_grid(grid: Iterable[Row]) -> dict[tuple[str, int], Best]:
    """The best of the grid, by case and seed."""
    found = {}
    for case, by_lr in _by_case_and_lr(grid).items():
        for seed in {seed for losses in by_lr.values() for seed in losses}:
            losses = {lr: by_lr[lr][seed] for lr in sorted(by_lr) if seed in by_lr[lr]}
            best = min(losses, key=lambda lr: losses[lr])
            if math.isfinite(losses[best]):
                good = [lr for lr in losses if losses[lr] <= BAND * losses[best]]
                found[case, seed] = Best(losses[best], best, good[0], good[-1])
    return found


def tuned_lrs(grid: Iterable[Row]) -> dict[str, float]:
    """The LR that is best over all seeds, by case; of those that ran on most seeds."""
    found = {}
    for case, by_lr in _by_case_and_lr(grid).items():
        seeds = max(len(losses) for losses in by_lr.values())
        found[case] = min((lr for lr in by_lr if len(by_lr[lr]) == seeds), key=lambda lr: geometric_mean(by_lr[lr].values()))
    return found


def freeze(tuned: Iterable[Row], path: Path) -> None:
    """Write the targets of the profile, once, of the cases that were tuned on three seeds: of the last looks, as those of a run."""
    last: dict[str, list[float]] = {}
    for row in tuned:
        if row["method"] == TUNED:
            last.setdefault(row["case"], []).append(row["looks"][-1] if row["finite"] else math.inf)
    targets = {case: round(statistics.median(losses), 6) for case, losses in last.items() if len(losses) >= 3}
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(targets | kept, indent=1) + "\n")


@dataclass(frozen=True)
class Outcome:
    """A run beside the grid.

    Attributes:
        ratio: test loss over the best of the grid on that seed; infinite where the run ended non-finite.
        lr: with which the cooldown began, or that of the switch; None where there was neither.
        steps: share of the run after which a tuned run is as good; None where none was trained.
    """

    case: str
    seed: int
    method: str
    ratio: float
    lr: float | None
    best: Best
    switch_step: int | None
    steps: float | None = None

    @property
    def decades(self) -> float | None:
        """Of LR, from the grid's best; below it is negative."""
        return None if self.lr is None else math.log10(self.lr / self.best.lr)

    @property
    def beyond(self) -> float | None:
        """Decades of LR from the nearest that is about as good as the grid's best."""
        return None if self.lr is None else abs(math.log10(self.lr / min(max(self.lr, self.best.low), self.best.high)))

    def __str__(self) -> str:
        off = "" if self.decades is None else f"  lr {self.lr:.2g}  best {self.best.lr:.2g}  {self.decades:+.2f} decades"
        return f"{self.case:24}  seed {self.seed}  {self.method}  ratio {self.ratio:.2f}{off}  switch {self.switch_step}"


def outcomes(rows: Iterable[Row], best: dict[tuple[str, int], Best], tuned: Iterable[Row] = ()) -> list[Outcome]:
    """The runs of `rows` whose grid is known, beside it and the tuned runs at several lengths."""
    lengths: dict[tuple[str, int], dict[float, float]] = {}
    for row in tuned:
        loss = max(row["test_loss"], FLOOR) if row["finite"] else math.inf
        lengths.setdefault((row["case"], row["seed"]), {})[float(row["method"].split()[1])] = loss
    found = []
    for row in rows:
        key = row["case"], row["seed"]
        if row["method"] != "grid" and not row["method"].startswith("tuned") and key in best:
            own = max(row["test_loss"], FLOOR) if row["finite"] else math.inf
            lr = row.get("cooldown_lr") or row.get("found_lr")
            steps = _steps_to(own, lengths[key]) if key in lengths else None
            found.append(Outcome(*key, row["method"], own / best[key].loss, lr, best[key], row.get("switch_step"), steps))
    return found


def sweep(grid: Iterable[Row], seeds: Iterable[int]) -> list[Outcome]:
    """What an honest one comes to on each of `seeds`: with the LR that is best on the others, of those that ran on all of them."""
    grid, seeds, found = [*grid], {*seeds}, []
    best = best_of_grid(grid)
    for case, by_lr in _by_case_and_lr(grid).items():
        known = {lr: losses for lr, losses in by_lr.items() if seeds <= losses.keys()}
        for seed in sorted(seeds) if known and len(seeds) > 1 else ():
            lr = min(known, key=lambda lr: geometric_mean(known[lr][other] for other in seeds - {seed}))
            if (case, seed) in best:
                found.append(Outcome(case, seed, "sweep", known[lr][seed] / best[case, seed].loss, lr, best[case, seed], None))
    return found


def _steps_to(loss: float, by_length: dict[float, float]) -> float:
    """Length of a tuned run that ends as low as `loss`."""
    before, lowest = min(by_length), math.inf
    for length in sorted(by_length):
        if by_length[length] <= loss:
            if not math.isfinite(lowest):
                return length
            part = math.log(lowest / loss) / math.log(lowest / by_length[length])
            return before + part * (length - before)
        before, lowest = (length, by_length[length]) if by_length[length] < lowest else (before, lowest)
    return max(by_length)


def _error(values: list[float]) -> str:
    """Mean of the logarithms and its standard error, as a factor and a share of it."""
    if not all(map(math.isfinite, values)):
        return "inf"
    mean = math.exp(statistics.fmean(values))
    return f"{mean:.3f}" + (f" ± {mean * statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else "")


def _logs(runs: list[Outcome], key: str) -> list[float]:
    """The mean logarithm of the ratio by case or seed."""
    return _means((getattr(run, key), math.log(run.ratio)) for run in runs)


def _paired(runs: list[Outcome], others: list[Outcome]) -> str:
    """The ratio of the ones over the others', on the runs that both have."""
    known = {(run.case, run.seed): run.ratio for run in others}
    same = (run for run in runs if (run.case, run.seed) in known)
    by_case = _means((run.case, math.log(run.ratio) - math.log(known[run.case, run.seed])) for run in same)
    return _error(by_case) if by_case else ""


def _points(rows: Iterable[Row], targets: dict[str, float]) -> dict[str, dict[tuple[str, int], float]]:
    """Of every method that was looked at during its runs, what each run scores; 0 is a miss."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        known = row["method"] in (TUNED,) or not row["method"].startswith("tuned")
        if known and row.get("looks") and row["case"] in targets:
            meets = (t for t, x in zip(LOOKS, row["looks"], strict=True) if x is not None and x <= targets[row["case"]])
            times.setdefault((row["case"], row["seed"]), {})[row["method"]] = next(meets, math.inf)
    found: dict[str, dict[tuple[str, int], float]] = {}
    for run, by_method in times.items():
        best = min(by_method.values())
        for method, reached in by_method.items():
            within = LONGEST_FACTOR - min(reached / best, LONGEST_FACTOR) if math.isfinite(reached) else 0.0
            found.setdefault(method, {})[run] = within / (LONGEST_FACTOR - 1)
    return found


def profile(rows: Iterable[Row], targets: dict[str, float], against: str) -> str:
    """Markdown: the score of every method that was looked at during the run, and how far it is below another's on the same runs."""
    by_method = _points(rows, targets)
    lines = ["", f"| method | runs | score | targets met | below {against} |", "|---" * 5 + "|"]
    for method, own in by_method.items():
        met = sum(point > 0 for point in own.values())
        lines.append(f"| {method} | {len(own)} | {_score(own)} | {met} | {_below(own, by_method.get(against, {}))} |")
    return "\n".join(lines)


def beside_peers(found: list[Outcome], rows: Iterable[Row], targets: dict[str, float]) -> str:
    """Markdown: a row for the default and each peer of :data:`NAMES`, the best first; others are left out of the scores, too."""
    scored = _points((row for row in rows if row["method"] in (*NAMES, TUNED)), targets)
    heads = ("method", "cases", "test loss", "over AutoWU's", "worst case", "steps", "score", "below AutoWU's", "targets met")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    by_method = {method: runs for method in NAMES if (runs := [run for run in found if run.method == method])}
    for method in sorted(by_method, key=lambda method: statistics.fmean(_logs(by_method[method], "seed"))):
        own, cells = scored[method], _cells(by_method[method], by_method["default"])
        over, below = ("", "") if method == "default" else (cells[3], _below(own, scored["default"]))
        met = f"{sum(point > 0 for point in own.values())} of {len(own)}"
        lines.append(f"| {' | '.join((NAMES[method], cells[0], cells[2], over, cells[4], cells[-1], _score(own), below, met))} |")
    if TUNED in scored:
        lines += ["", f"A tuned run itself scores {_score(scored[TUNED])}."]
    return "\n".join(lines)


def _score(own: dict[tuple[str, int], float]) -> str:
    return _mean_and_error(_means((seed, point) for (_, seed), point in own.items()))


def _below(own: dict[tuple[str, int], float], other: dict[tuple[str, int], float]) -> str:
    by_case = _means((run[0], other[run] - point) for run, point in own.items() if run in other)
    return _mean_and_error(by_case) if by_case else ""


def _means(values: Iterable[tuple[Any, float]]) -> list[float]:
    """The mean of the values that have the same key, for each key."""
    groups: dict[Any, list[float]] = {}
    for key, value in values:
        groups.setdefault(key, []).append(value)
    return [statistics.fmean(group) for group in groups.values()]


def _mean_and_error(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def _cells(runs: list[Outcome], others: list[Outcome]) -> list[str]:
    by_case = [math.exp(mean) for mean in _logs(runs, "case")]
    off = [abs(run.decades) for run in runs if run.decades is not None]
    beyond = [run.beyond for run in runs if run.beyond is not None]
    shares = [run.switch_step / int(run.case.split()[-1]) for run in runs if run.switch_step is not None]
    steps = [run.steps for run in runs if run.steps is not None]
    return [
        *(f"{len(by_case)}", f"{len(runs)}", _error(_logs(runs, "seed")), _paired(runs, others)),
        *(f"{max(by_case):.2f}", f"{max(run.ratio for run in runs):.2f}"),
        *(
            f"{sum(d > 0.5 for d in off)} ({sum(d > 0.5 for d in beyond)})",
            f"{sum(d > 1 for d in off)} ({sum(d > 1 for d in beyond)})",
        ),
        *(f"{sum(math.isinf(run.ratio) for run in runs)}", f"{statistics.fmean(shares):.0%}" if shares else ""),
        f"{geometric_mean(steps):.2f}" if steps else "",
    ]


def table(found: list[Outcome], against: str, common: bool = False) -> str:
    """Markdown: a row a method, then a row a case; `common` takes only the cases and seeds that all methods have."""
    methods = list(dict.fromkeys(run.method for run in found))
    if common:
        shared = set.intersection(*({(run.case, run.seed) for run in found if run.method == m} for m in methods))
        found = [run for run in found if (run.case, run.seed) in shared]
    heads = (
        *("cases", "runs", "test loss", f"against {against}", "worst case", "worst run"),
        *("over half a decade", "over one", "non-finite", "warm-up", "steps"),
    )
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    others = [run for run in found if run.method == against]
    for method in methods:
        if runs := [run for run in found if run.method == method]:
            lines.append(f"| {method} | {' | '.join(_cells(runs, others))} |")
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
