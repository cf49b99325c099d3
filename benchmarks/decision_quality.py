"""How good are the decisions? Rules replayed on recorded warm-ups, against the curve's own minimum and against the grid of LRs.

    python benchmarks/decision_quality.py [--rules default paper ...] [--jobs 2] [--curves]

Replays every rule of RULES on the warm-ups of data/recorded.jsonl (record_warmups.py) and data/warmups.jsonl: AutoWU on a dummy
optimizer is fed the recorded losses, NaN where they are null or have ended, until it switches. What is asked of a decision:

- The *minimum* of a curve is the lowest point of its smooth, a running median of the full warm-up over half a decade of LR, NaN
  left out, the highest losses clipped as AutoWU clips them. (The GP that AutoWU fits swings below the curve beside a cliff, and
  makes minima there.) It lies *inside* if it comes before 90 % of the warm-up and is followed by a loss that is not finite, or by
  a clear rise: the highest point of the smooth after it stands above it by a tenth of the fall from the highest point before it,
  and by 6 standard errors. The *valley* begins at the first point of the smooth that is above the minimum by no more than 2 % of
  the fall.
- *Missed*: a curve with its minimum inside whose warm-up ended at its limit, without a switch by test.
- *Exploded*: a warm-up that ended before its limit without a switch by test, because the loss exploded.
- *Overshoot*: decades of LR from the minimum to the step of the switch, of switches before the limit on curves with a minimum
  inside.
- *Before*: fitted minimum more than half a decade below the LR at which the valley begins, on curves with a minimum inside.
- *Early*, *late*: chosen LR more than half a decade below, or above, the best band of the case's grid in results/regret.jsonl:
  the LRs whose geometric mean of test loss over the seeds is within 10 % of the case's best. Recorded.jsonl only; seeds without
  all of the nine LRs are left out, and so are cases without such a seed. *Off*: decades from the chosen LR to the nearest edge of
  the band, 0 inside, below 0 under it: the median, and the mean of its absolute value.

The recordings are of an even ramp; `runs` in the results is of AutoWU's runs in results/regret.jsonl, on its own.

For tuning there are seeds 0 and 1 of recorded.jsonl and the lines of odd number of warmups.jsonl; the others are held out. Prints
a table for each and writes results/decision_quality.json; --curves also lists what was missed, early, late or before the minimum.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tasks import make_optimizer

from autowu import AutoWU
from autowu.gp import NUM_START_POINTS, ClosedFormGP
from autowu.phases import Switch

HERE = Path(__file__).parent
GRID_LRS = 9
NEAR = 0.5
"""Decades of LR by which a decision may be off."""

RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"paper": True, "tests": 15},
    "15 tests": {"tests": 15},
    "60 tests, patience 3": {"tests": 60, "patience": 3},
    "120 tests": {"tests": 120},
    "patience 2": {"patience": 2},
    "patience 3": {"patience": 3},
    "patience 5": {"patience": 5},
    "no contrast": {"min_contrast": 0.0},
    "no rise, the minimum": {"min_rise": 0.0, "peak_factor": 0.8},
    "rise of a tenth": {"min_rise": 0.1},
    "rise of a third": {"min_rise": 0.33},
    "length-scale of a fifth": {"gp": ClosedFormGP(0.2)},
}
"""Keyword arguments of AutoWU, but ``tests``, a number of tests in a full warm-up, and ``paper``, for AutoWU.paper.

The recordings are of an even ramp, over 40 % of the run or more, and so are the replays, with 75 tests: as many a decade of LR as
the default makes after the first quarter of its own ramp, where a minimum is found."""

TESTS = 75


@dataclass(frozen=True)
class Minimum:
    """Where a full warm-up is lowest, see the head of this file; positions are fractions of the warm-up.

    Attributes:
        position: of the minimum.
        valley: of the beginning of the valley.
        inside: whether it is a minimum that a rule should find.
        rise: from the minimum, as a share of the fall to it.
    """

    position: float
    valley: float
    inside: bool
    rise: float


def find_minimum(all_losses: Sequence[float], decades: float) -> Minimum:
    losses = np.minimum(all_losses, 2 * np.nanmedian(all_losses[:NUM_START_POINTS]) - np.nanmin(all_losses))
    half = max(2, round(0.25 / decades * len(losses)))
    centres, smooth, errors = [], [], []
    for centre in range(len(losses)):
        window = losses[max(0, centre - half) : centre + half + 1]
        window = window[np.isfinite(window)]
        if math.isfinite(losses[centre]):
            centres.append(centre)
            smooth.append(float(np.median(window)))
            deviation = 1.48 * float(np.median(np.abs(window - smooth[-1])))
            errors.append(1.25 * deviation / math.sqrt(len(window)))  # of a median of normal losses
    lowest = int(np.argmin(smooth))
    highest = lowest + int(np.argmax(smooth[lowest:]))
    fall, rise = max(smooth[: lowest + 1]) - smooth[lowest], smooth[highest] - smooth[lowest]
    clear = rise > 0.1 * fall and rise > 6 * math.hypot(errors[lowest], errors[highest])
    valley = next(k for k, value in enumerate(smooth) if value <= smooth[lowest] + 0.02 * fall)
    position = (centres[lowest] + 0.5) / len(losses)
    return Minimum(
        position=position,
        valley=(centres[valley] + 0.5) / len(losses),
        inside=position < 0.9 and (clear or len(centres) < len(losses)),
        rise=rise / fall if fall > 0 else math.inf,
    )


@dataclass(frozen=True)
class Curve:
    """A recorded warm-up and what is true of it.

    Attributes:
        losses: of all steps of the warm-up, NaN where not finite or after the end of the recording.
        minimum: where it is lowest.
        band: lowest and highest LR of the best band of its case's grid, if there is one.
        optimizer: its name, for `tasks.make_optimizer`.
    """

    name: str
    source: str
    held_out: bool
    warmup_steps: int
    min_lr: float
    max_lr: float
    losses: tuple[float, ...]
    minimum: Minimum
    band: tuple[float, float] | None
    optimizer: str

    @property
    def decades(self) -> float:
        return math.log10(self.max_lr / self.min_lr)

    def lr_at(self, position: float) -> float:
        return self.min_lr * 10 ** (position * self.decades)


@dataclass(frozen=True)
class Outcome:
    """What a rule made of a curve; decades of LR, None where the question does not arise.

    Attributes:
        overshoot: from the minimum to the step of the switch.
        from_valley: from the beginning of the valley to the chosen LR.
        off: from the nearest edge of the band to the chosen LR, 0 inside.
    """

    curve: str
    source: str
    held_out: bool
    step: int
    lr: float
    by_test: bool
    missed: bool
    exploded: bool
    overshoot: float | None
    from_valley: float | None
    off: float | None

    @property
    def before(self) -> bool:
        return self.from_valley is not None and self.from_valley < -NEAR

    @property
    def early(self) -> bool:
        return self.off is not None and self.off < -NEAR

    @property
    def late(self) -> bool:
        return self.off is not None and self.off > NEAR


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_bands(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Lowest and highest LR within 10 % of the best of each case's grid, over the seeds that have all of its LRs."""
    grids: dict[str, dict[int, dict[float, float]]] = {}
    for row in rows:
        if row["method"] == "grid":
            loss = math.log(row["test_loss"]) if row["finite"] else math.inf
            grids.setdefault(row["case"], {}).setdefault(row["seed"], {})[row["lr"]] = loss
    bands = {}
    for case, seeds in grids.items():
        whole = [grid for grid in seeds.values() if len(grid) == GRID_LRS]
        if whole:
            means = {lr: sum(grid[lr] for grid in whole) / len(whole) for lr in whole[0]}
            good = [lr for lr, mean in means.items() if mean <= min(means.values()) + math.log(1.1)]
            bands[case] = min(good), max(good)
    return bands


def distance(lr: float, band: tuple[float, float]) -> float:
    """Decades from an LR to the nearest edge of a band, below 0 under it, 0 inside."""
    low, high = (math.log10(lr / edge) for edge in band)
    return min(low, 0.0) + max(high, 0.0)


def in_runs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How AutoWU chose in the runs of regret.py themselves, on its own ramp."""
    bands = best_bands(rows)
    runs = [row for row in rows if row["method"] == "autowu" and row["case"] in bands]
    offs = {f"{row['case']} seed {row['seed']}": distance(row["found_lr"], bands[row["case"]]) for row in runs}
    return {
        "runs": len(offs),
        "early": sorted(name for name, off in offs.items() if off < -NEAR),
        "late": sorted(name for name, off in offs.items() if off > NEAR),
    }


def load_curves(recorded: Path, warmups: Path, grid: Path) -> list[Curve]:
    bands = best_bands(read(grid))
    lines = [(row, "recorded", row["seed"] >= 2) for row in read(recorded)]
    lines += [(row, "warmups", number % 2 == 0) for number, row in enumerate(read(warmups), 1)]
    curves = []
    for row, source, held_out in lines:
        losses = [math.nan if loss is None else loss for loss in row["losses"]]
        losses += [math.nan] * (row["warmup_steps"] - len(losses))
        case = row.get("case") or "{task} {optimizer} {batch_size} ".format(**row) + str(2 * row["warmup_steps"])
        curves.append(
            Curve(
                name=f"{case} seed {row['seed']}",
                source=source,
                held_out=held_out,
                warmup_steps=row["warmup_steps"],
                min_lr=row["min_lr"],
                max_lr=row["max_lr"],
                losses=tuple(losses),
                minimum=find_minimum(losses, math.log10(row["max_lr"] / row["min_lr"])),
                band=bands.get(case) if source == "recorded" else None,
                optimizer=row["optimizer"],
            )
        )
    return curves


def replay(curve: Curve, rule: str) -> Switch:
    """The switch that a rule makes on a curve."""
    arguments = dict(RULES[rule])
    make = AutoWU.paper if arguments.pop("paper", False) else AutoWU
    arguments["test_interval"] = max(1, curve.warmup_steps // arguments.pop("tests", TESTS))
    optimizer = make_optimizer(curve.optimizer, torch.nn.Linear(1, 1), 1.0)
    run: dict[str, Any] = {"total_steps": 2 * curve.warmup_steps, "max_warmup_fraction": 0.5, "warmup_type": "exp"}
    run["immediate_cooldown"] = True  # a cooldown would end the warm-up before
    scheduler = make(optimizer, **(run | {"min_lr": curve.min_lr, "max_lr": curve.max_lr} | arguments))
    optimizer.step()
    for loss in curve.losses:
        scheduler.step(loss)
        if scheduler.switch is not None:
            return scheduler.switch
    raise AssertionError("a warm-up ends with a switch")


def judge(job: tuple[Curve, str]) -> Outcome:
    """Replay a rule on a curve in a process of a pool."""
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    curve, rule = job
    switch = replay(curve, rule)
    off, inside, before_limit = None, curve.minimum.inside, switch.by_test or switch.step < curve.warmup_steps
    if curve.band is not None:
        off = distance(switch.lr, curve.band)
    return Outcome(
        curve=curve.name,
        source=curve.source,
        held_out=curve.held_out,
        step=switch.step,
        lr=switch.lr,
        by_test=switch.by_test,
        missed=inside and not before_limit,
        exploded=before_limit and not switch.by_test,
        overshoot=(switch.step / curve.warmup_steps - curve.minimum.position) * curve.decades if inside and before_limit else None,
        from_valley=(switch.minimum / curve.warmup_steps - curve.minimum.valley) * curve.decades
        if inside and switch.minimum
        else None,
        off=off,
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, int | float | None]:
    """The numbers of one rule on one set of curves."""
    overshoots = [o.overshoot for o in outcomes if o.overshoot is not None]
    offs = [o.off for o in outcomes if o.off is not None]

    def rounded(function: Any, values: list[float], *args: float) -> float | None:
        return round(float(function(values, *args)), 3) if values else None

    return {
        "curves": len(outcomes),
        "switched_by_test": sum(o.by_test for o in outcomes),
        "exploded": sum(o.exploded for o in outcomes),
        "with_minimum": sum(o.from_valley is not None for o in outcomes),
        "missed": sum(o.missed for o in outcomes),
        "overshoot_median": rounded(np.median, overshoots),
        "overshoot_90_percent": rounded(np.quantile, overshoots, 0.9),
        "before": sum(o.before for o in outcomes),
        "with_band": len(offs),
        "early": sum(o.early for o in outcomes),
        "late": sum(o.late for o in outcomes),
        "off_median": rounded(np.median, offs),
        "off_mean_absolute": rounded(np.mean, [abs(off) for off in offs]),
    }


COLUMNS = {
    "by test": "{switched_by_test} of {curves}",
    "exploded": "{exploded}",
    "missed": "{missed} of {with_minimum}",
    "overshoot, median": "{overshoot_median:.2f}",
    "90 %": "{overshoot_90_percent:.2f}",
    "before": "{before} of {with_minimum}",
    "early": "{early} of {with_band}",
    "late": "{late} of {with_band}",
    "off, median": "{off_median:+.2f}",
    "mean size": "{off_mean_absolute:.2f}",
}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"| rule | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for rule, numbers in results.items():
        shown = {key: math.nan if value is None else value for key, value in numbers.items()}
        lines.append(f"| {rule} | {' | '.join(column.format(**shown) for column in COLUMNS.values())} |")
    return "\n".join(lines)


def describe(curve: Curve, outcome: Outcome) -> str:
    """A decision that was missed, early, late or before the minimum, in a line."""
    faults = [name for name in ("missed", "before", "early", "late") if getattr(outcome, name)]
    band = f", band {curve.band[0]:.3g} to {curve.band[1]:.3g}" if curve.band else ""
    how = "by test" if outcome.by_test else "at an explosion" if outcome.exploded else "at the limit"
    minimum = curve.minimum
    place = f"LR of the valley {curve.lr_at(minimum.valley):.3g}, of the minimum {curve.lr_at(minimum.position):.3g}"
    decided = f"switched {how} at LR {curve.lr_at(outcome.step / curve.warmup_steps):.3g}, to {outcome.lr:.3g}"
    return f"{', '.join(faults)}: {curve.source} {curve.name}: {decided}; {place}{band}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=HERE / "data" / "recorded.jsonl")
    parser.add_argument("--warmups", type=Path, default=HERE / "data" / "warmups.jsonl")
    parser.add_argument("--grid", type=Path, default=HERE / "results" / "regret.jsonl")
    parser.add_argument("--rules", nargs="+", default=[*RULES], choices=[*RULES])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--curves", action="store_true", help="list the decisions with a fault")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "decision_quality.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves = load_curves(args.recorded, args.warmups, args.grid)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        found = list(pool.map(judge, [(curve, rule) for rule in args.rules for curve in curves], chunksize=5))
    outcomes = {rule: found[k * len(curves) : (k + 1) * len(curves)] for k, rule in enumerate(args.rules)}
    numbers: dict[str, dict[str, dict[str, Any]]] = {}
    for split, held_out in (("tuning", False), ("held out", True)):
        of_split = {rule: [o for o in all_of_rule if o.held_out == held_out] for rule, all_of_rule in outcomes.items()}
        numbers[split] = {
            rule: summary(chosen) | {s: summary([o for o in chosen if o.source == s]) for s in ("recorded", "warmups")}
            for rule, chosen in of_split.items()
        }
        print(f"\n{split}\n\n{table(numbers[split])}")
    if args.curves:
        for rule, all_of_rule in outcomes.items():
            print(f"\n{rule}:\n")
            for curve, outcome in zip(curves, all_of_rule, strict=True):
                if outcome.missed or outcome.before or outcome.early or outcome.late:
                    print(f"- {describe(curve, outcome)}")
    runs = in_runs(read(args.grid))
    print(f"\nIn {runs['runs']} runs early: {', '.join(runs['early'])}; late: {', '.join(runs['late'])}")
    args.out.write_text(json.dumps({"splits": numbers, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
