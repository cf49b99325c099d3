"""Could probes tell a better peak LR in long runs, where one of a few per cent has a hundred steps?

    python benchmarks/probes_long.py [--cases net "friedman*sgd"] [--seeds 0 1] [--minutes 3]
    python benchmarks/probes_long.py --report

As probes.py, with runs of thousands of fast steps, and with what might help:

- All probes of a comparison see the same batches. So the difference of two has a standard error, from its values in the last
  quarter of their steps, and a multiple can be asked to be *surely* lower than the peak.
- On seed 0 they are made at the switch, and after one and two thirds of the steps from there to the cooldown. Beside their training
  losses stands what no run would pay for, the loss of a thousand rows of the training set at the end of a probe.
- The ends of half, once and twice the peak are had with two orders of the batches: how much of a difference is noise?

What chooses well there is then done in runs of their own, which pay for it: a *climb*. It is judged beside the runs without a probe
(the mean of two orders of the batches), and beside itself where it never raises the LR.

What is tried is a line of JSON in results/probes_long.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measures import FLOOR, geometric_mean
from numpy.typing import NDArray
from probes import CLIP, Run, _finite
from regret import read
from torch import Tensor

from autowu.phases import cooldown_begin
from autowu.schedules import cooldown_factor

RESULTS = Path(__file__).parent / "results" / "probes_long.jsonl"
CASES = (
    *("friedman sgd 64 8000", "friedman adamw 64 5000", "friedman lion 64 5000", "autoencoder sgd 64 6000"),
    *("autoencoder nadam 64 4000", "net adamw 32 5000", "net sgd 32 8000", "spirals sgd 64 6000", "ripples adamw 64 5000"),
    *("mlp lion 64 4000", "checkers muon 64 3000"),
)
MULTIPLES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
SHARES = (0.01, 0.02, 0.04)
"""Lengths of the probes, in runs."""
ROWS = 1024
MOST = 0.08
"""Share of the run that a climb spends at most."""
CHOSEN = ("climb 0.01 3 0.25 0.5 0.75", "climb 0.01 inf 0.25 0.5 0.75")
"""Length of a probe, standard errors, moments. Of infinite ones, nothing is sure: what the probes alone cost."""
TRIED = (
    *("climb 0.01 3 0 0.333 0.667", "climb 0.01 inf 0 0.333 0.667", "keep 0.01 3 0 0.333 0.667", "keep 0.01 inf 0 0.333 0.667"),
    *("climb 0.01 3 0.333 0.667", "climb 0.01 inf 0.333 0.667"),
)
"""Of seeds 0 and 1."""
NAMES = ("0, 1/3, 2/3", "the same, the winner kept", "1/3, 2/3", "1/4, 1/2, 3/4")
"""What the page calls them."""


class LongRun(Run):
    """A run up to its switch, with ends and probes of several times."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed)
        self.begin = int(cooldown_begin(self.config, self.switch))

    def _down(self) -> list[float]:
        """The factors of the decay."""
        steps = self.case.steps - self.begin
        return [cooldown_factor(k / steps, self.config.cooldown_type) for k in range(steps)]

    def _ends(self) -> dict[str, float]:
        parts = (("test", self.task.test, 2048), ("train", self.task.train, 2 * ROWS))
        return {name: self.task.evaluate(self.model, data, limit)[0] for name, data, limit in parts}

    def end(self, multiple: float, order: int) -> dict[str, float]:
        """The losses at the end."""
        peak, stable = multiple * self.switch.lr, self.begin - self.switch.step
        self.train([peak] * stable + [peak * factor for factor in self._down()], self.seed + 1000 + 100 * order)
        return self._ends()

    def _steps(self, share: float) -> int:
        return round(share * self.case.steps)

    def _probe(self, lr: float, share: float, seed: int) -> NDArray[np.float64]:
        """The losses of a probe."""
        steps = self._steps(share)
        held = round(2 / 3 * steps)
        lrs = [lr * min(1, (steps - step) / (steps - held + 1)) for step in range(steps)]
        return np.array([_finite(loss) for loss in self.train(lrs, seed)])

    def probes(self, at: int, share: float) -> dict[str, Any]:
        """One of each multiple, on the same batches."""
        held, tail = round(2 / 3 * self._steps(share)), -max(3, self._steps(share) // 4)
        row: dict[str, Any] = {"exact": {}, "held": {}, "annealed": {}, "less": {}}
        losses = {}
        for m in MULTIPLES:
            losses[m] = self._probe(m * self.switch.lr, share, 7919 * (self.seed + 1) + 10 * at + round(1000 * share))
            row["exact"][f"{m:g}"] = self.task.evaluate(self.model, self.task.train, ROWS)[0]
            row["held"][f"{m:g}"] = losses[m][held // 2 : held].mean()
            row["annealed"][f"{m:g}"] = losses[m][tail:].mean()
        for m in MULTIPLES:
            if m != 1:  # mean and standard error
                less = (losses[m] - losses[1.0])[tail:]
                row["less"][f"{m:g}"] = [less.mean(), less.std(ddof=1) / math.sqrt(len(less))]
        return row

    def climb(self, share: float, errors: float, moments: Sequence[float], keep: bool = False) -> dict[str, Any]:
        """The end of a run that probes for what they cost, and doubles its LR where that is surely better.

        At each of the moments, shares of the stable phase, the LR as it is and its double are probed. As long as the double is
        lower by so many standard errors it is taken, and the next is probed. What is spent is taken from the stable phase. With
        `keep` the run goes on from the end of the probe that won, so that its steps are not lost.
        """
        first, batches = self.copy, self.task.batches(self.case.batch_size, self.seed + 1000)
        steps, most = self._steps(share), self._steps(MOST)
        stable, at, spent, lr, told = self.begin - self.switch.step, 0, 0, self.switch.lr, []
        for number, moment in enumerate(moments):
            if spent + 2 * steps > most:
                break
            gone = max(0, round(moment * stable) - at)
            self._follow([lr] * gone, batches)
            at += gone
            seed = 7919 * (self.seed + 1) + 10 * number + round(1000 * share)
            now, better = self._probe(lr, share, seed), True
            end = self._state()
            before, spent = spent, spent + steps
            while better and spent + steps <= most:
                double = self._probe(2 * lr, share, seed)
                spent += steps
                less = (now - double)[-max(3, steps // 4) :]
                told.append(float(less.mean() / (less.std(ddof=1) / math.sqrt(len(less)) + 1e-12)))
                better = told[-1] > errors
                if better:
                    lr, now, end = 2 * lr, double, self._state()
            self.copy = end if keep else self.copy
            at += spent - before
        self._follow([lr] * (stable - at) + [lr * factor for factor in self._down()], batches)
        found = self._ends() | {"spent": spent, "multiple": lr / self.switch.lr, "told": told}
        self.copy = first
        return found

    def _follow(self, lrs: list[float], batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Go on, a step an LR, and take that as where to go back to."""
        self.go_back()
        for lr in lrs:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._step(batches)
        self.copy = self._state()

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What :meth:`go_back` goes back to."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def go_on(self, steps: int, part: int) -> None:
        """Train on at the peak, and take that as where to go back to."""
        self.train([self.switch.lr] * steps, self.seed + 5000 + part)
        self.copy = self._state()


def planned(seed: int) -> tuple[str, ...]:
    """What is tried of a seed."""
    ends = tuple(f"end {m:g} {order}" for order, among in enumerate((MULTIPLES, MULTIPLES[1:4])) for m in among)
    probes = tuple(f"probes {part} {share:g}" for part in range(3) for share in SHARES)
    return ((*ends, *probes) if seed == 0 else ("end 1 0", "end 1 1")) + CHOSEN + (TRIED if seed < 2 else ())


def pieces(name: str, seed: int, missing: list[str]) -> Iterator[dict[str, Any]]:
    """What is missing of what is tried on a case: lines of the results file."""
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    a_run, at = LongRun(name, seed), 0
    facts = {"lr": a_run.switch.lr, "step": a_run.switch.step, "begin": a_run.begin}
    for piece in missing:
        kind, *numbers = piece.split()
        started = time.process_time()
        if kind == "end":
            found: dict[str, Any] = a_run.end(float(numbers[0]), int(numbers[1]))
        elif kind in ("climb", "keep"):
            share, errors, *moments = map(float, numbers)
            found = a_run.climb(share, errors, moments, kind == "keep")
        else:
            while at < int(numbers[0]):
                a_run.go_on((a_run.begin - a_run.switch.step) // 3, at)
                at += 1
            found = a_run.probes(at, float(numbers[1]))
        row = {"case": name, "seed": seed, "piece": piece} | facts | found | {"seconds": time.process_time() - started}
        yield json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.6g}"))


CHOICE = ("0.5", "1", "2")
Pieces = dict[str, dict[str, Any]]
"""All that was found out about a run, by piece."""
Runs = dict[tuple[str, int], Pieces]
Choice = Callable[[Pieces], str]


def by_run(rows: list[dict[str, Any]], seeds: Sequence[int]) -> Runs:
    """The runs of these seeds, by case and seed."""
    runs: Runs = {}
    for row in rows:
        if row["seed"] in seeds:
            runs.setdefault((row["case"], row["seed"]), {})[row["piece"]] = row
    return runs


def ratio(found: Pieces, piece: str, *beside: str) -> float:
    """The test loss at an end over the mean of others', of a floor and cut as in probes.py."""
    lower, *upper = (max(FLOOR, _finite(found[name]["test"])) for name in (piece, *beside))
    return min(CLIP, max(1 / CLIP, lower / geometric_mean(upper)))


def worst_case(ratios: dict[tuple[str, int], float]) -> float:
    return max(geometric_mean(r for (c, _), r in ratios.items() if c == case) for case, _ in ratios)


def lowest(reading: str, part: int, share: float) -> Choice:
    """The multiple of the lowest reading."""
    return lambda found: min(CHOICE, key=lambda m: _finite(found[f"probes {part} {share:g}"][reading][m]))


def sure(errors: float, part: int, share: float, among: Sequence[str] = CHOICE) -> Choice:
    """The lowest of those that are lower than the peak by so many standard errors."""

    def choose(found: Pieces) -> str:
        less = found[f"probes {part} {share:g}"]["less"]
        return min(
            (m for m in among if m == "1" or -less[m][0] > errors * less[m][1]), key=lambda m: 0.0 if m == "1" else less[m][0]
        )

    return choose


def report_of_choices(runs: Runs) -> list[str]:
    """The table of what chooses, costs aside."""
    lines = ["| what chooses | when | steps of a probe | test loss | worst | moved |", "|---" * 6 + "|"]

    def line(name: str, when: str, share: str, choose: Choice, order: int = 0) -> None:
        of = [choose(found) for found in runs.values()]
        ratios = [ratio(found, f"end {m} {order}", f"end 1 {order}") for m, found in zip(of, runs.values(), strict=True)]
        moved = f"{sum(m != '1' for m in of)} of {len(of)}"
        lines.append(f"| {name} | {when} | {share} | {geometric_mean(ratios):.2f} | {max(ratios):.2f} | {moved} |")

    def best(found: Pieces) -> str:
        return min(CHOICE, key=lambda m: found[f"end {m} 0"]["test"])

    line("the end itself", "", "", best)
    line("the same, in another order of the batches", "", "", best, 1)
    line("always half", "", "", lambda found: "0.5")
    line("always twice", "", "", lambda found: "2")
    for part, when in enumerate(("at the switch", "a third later")):
        for share in SHARES[::2]:
            length = f"{share:.0%}"
            line("training loss, annealed", when, length, lowest("annealed", part, share))
            line("the same, if surely lower", when, length, sure(3, part, share))
            line("the same, only twice", when, length, sure(3, part, share, ("1", "2")))
        line("loss of a thousand rows", when, length, lowest("exact", part, share))
    return lines


def report_of_climbs(rows: list[dict[str, Any]]) -> list[str]:
    """The table of what climbs."""
    head = (
        "seeds",
        "probes at",
        "test loss",
        "worst case",
        "over the probes alone",
        "worst",
        "the probes alone",
        "worst case",
        "raised",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * 9 + "|"]
    for seeds, among, names in (((0, 1), TRIED, NAMES), ((0, 1, 2), CHOSEN, NAMES[3:]), ((3, 4), CHOSEN, NAMES[3:])):
        for name, piece, alone in zip(names, among[::2], among[1::2], strict=False):
            runs = {key: found for key, found in by_run(rows, seeds).items() if piece in found}
            ratios = {key: ratio(found, piece, "end 1 0", "end 1 1") for key, found in runs.items()}
            numbers: tuple[float, ...] = (geometric_mean(ratios.values()), worst_case(ratios))
            if all(alone in found for found in runs.values()):
                over = [ratio(found, piece, alone) for found in runs.values()]
                costs = {key: ratio(found, alone, "end 1 0", "end 1 1") for key, found in runs.items()}
                numbers += (geometric_mean(over), max(over), geometric_mean(costs.values()), worst_case(costs))
            raised = f"{sum(found[piece]['multiple'] > 1 for found in runs.values())} of {len(runs)}"
            cells = (", ".join(map(str, seeds)), name, *(f"{x:.2f}" for x in numbers), *[""] * (6 - len(numbers)), raised)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    cases = [c for c in CASES if any(fnmatch.fnmatch(c, f"{p}*") for p in args.cases)]
    rows, started = read(RESULTS), time.perf_counter()
    done = {(row["case"], row["seed"], row["piece"]) for row in rows}
    for seed, case in product(args.seeds, [] if args.report else cases):
        missing = [piece for piece in planned(seed) if (case, seed, piece) not in done]
        if missing and time.perf_counter() - started < 60 * args.minutes:
            for row in pieces(case, seed, missing):
                rows.append(row)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if time.perf_counter() - started > 60 * args.minutes:
                    break
    print("\n".join((*report_of_choices(by_run(rows, (0,))), "", *report_of_climbs(rows))))


if __name__ == "__main__":
    main()
