"""Could probes after the switch tell a better peak LR?

    python benchmarks/probes.py [--cases vit "mlp*lion"] [--seeds 0 1] [--minutes 3.5]
    python benchmarks/probes.py --report [--seeds 0 1]

AutoWU trains a case of the hard suite up to its switch. From there each of some multiples of its peak is tried twice:

- to the end of the run, with AutoWU's own decay and the same batches for all. So it is known which multiple was the best.
- in *probes* of a few per cent of the run, each on batches of its own as in a run. A probe holds the LR for two thirds of its steps
  and brings it to zero on a line in the last third. What it ends with is the mean training loss of its last batches, and a held-out
  loss. The held-out loss is that of one half of the test set, and all ends are judged by the other half.

The report asks of each way to read the probes which multiple it chooses, and how the end is then, over that at the peak. What the
probes cost is not counted.
A run is a line of JSON in results/probes.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from hard_tasks import HARD
from measures import FLOOR, geometric_mean
from regret import Case, read
from tasks import Task, make_optimizer, make_task
from torch import Tensor

from autowu import AutoWU
from autowu.phases import cooldown_begin
from autowu.schedules import cooldown_factor

RESULTS = Path(__file__).parent / "results" / "probes.jsonl"
LONG = ("net adamw 32 5000", "net sgd 32 10000", "vit sgd 32 1000", "sounds adamw 32 300")
"""Of the suite, without a grid on seeds 1 and 2."""
CASES = tuple(case for case in HARD if case not in LONG)
MULTIPLES = (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
PROBES = (0.03, 0.08)
"""Lengths, as shares of the run."""
HIGHEST = 1e6
"""Stands for a loss that is not finite."""
CLIP = 4.0
"""A ratio counts as so much at most, and as its inverse at least: one run that fails must not be all that a mean tells."""


Data = tuple[Tensor, Tensor]


def halves(task: Task) -> tuple[Data, Data]:
    """The test set in two, the same every time: what judges, and what is seen by a run."""
    inputs, targets = task.test
    order = torch.from_numpy(np.random.default_rng(11).permutation(len(inputs)))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return (inputs[first], targets[first]), (inputs[second], targets[second])


class Run:
    """A run up to its switch, which can be gone on with from there again and again."""

    def __init__(self, name: str, seed: int) -> None:
        self.case, self.seed = Case.parse(name), seed
        self.task = make_task(self.case.task)
        torch.manual_seed(seed)
        self.model = self.task.new_model()
        self.optimizer = make_optimizer(self.case.optimizer, self.model, 1.0)
        scheduler = AutoWU(self.optimizer, total_steps=self.case.steps, model=self.model)
        batches = self.task.batches(self.case.batch_size, seed)
        while scheduler.switch is None:
            self._step(batches)
            scheduler.step(self.loss)
        self.switch, self.config = scheduler.switch, scheduler.config
        self.copy = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.judged_by, self.held_out = halves(self.task)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        inputs, targets = next(batches)
        loss = self.task.loss(self.model, inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.loss = loss.detach()

    def go_back(self) -> None:
        model, optimizer = copy.deepcopy(self.copy)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def train(self, lrs: list[float], seed: int) -> list[float]:
        """Go on from the switch, a step an LR; the losses."""
        self.go_back()
        batches, losses = self.task.batches(self.case.batch_size, seed), []
        for lr in lrs:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._step(batches)
            losses.append(float(self.loss))
        return losses

    def to_the_end(self, multiple: float) -> dict[str, Any]:
        peak, begin, total = multiple * self.switch.lr, cooldown_begin(self.config, self.switch), self.case.steps
        shape = self.config.cooldown_type
        lrs = [
            peak * (1 if step < begin else cooldown_factor((step - begin) / (total - begin), shape))
            for step in range(self.switch.step, total)
        ]
        losses = self.train(lrs, self.seed + 1000)
        ends = [self.task.evaluate(self.model, part)[0] for part in (self.judged_by, self.held_out)]
        return {"test": ends[0], "held_out": ends[1], "train": float(np.mean(losses[-max(1, total // 10) :]))}

    def probe(self, multiple: float, share: float) -> dict[str, Any]:
        steps = max(6, round(share * self.case.steps))
        held = round(2 / 3 * steps)
        lrs = [multiple * self.switch.lr * min(1, (steps - step) / (steps - held + 1)) for step in range(steps)]
        seed = hash((self.seed, round(math.log2(multiple)), round(1000 * share))) % 2**31
        before = {k: v.clone() for k, v in self.copy[0].items()}
        losses = self.train(lrs, seed)
        after = self.model.state_dict()
        floats = [k for k in before if before[k].is_floating_point() and before[k].ndim > 1]
        moved = [float((after[k] - before[k]).norm() / before[k].norm().clamp(min=1e-9)) for k in floats]
        return {
            "steps": steps,
            "held_out": self.task.evaluate(self.model, self.held_out)[0],
            "losses": [float(f"{x:.5g}") for x in losses],
            "moved": float(np.median(moved)),
        }


def run(name: str, seed: int) -> dict[str, Any]:
    """All that is tried on a case; the line of the results file."""
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    started = time.perf_counter()
    a_run = Run(name, seed)
    a_run.go_back()
    row: dict[str, Any] = {"case": name, "seed": seed, "lr": a_run.switch.lr, "step": a_run.switch.step}
    row["held_out"] = a_run.task.evaluate(a_run.model, a_run.held_out)[0]
    row["ends"] = {f"{m:g}": a_run.to_the_end(m) for m in MULTIPLES}
    row["probes"] = {f"{s:g}": {f"{m:g}": a_run.probe(m, s) for m in MULTIPLES} for s in PROBES}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _finite(loss: float | None) -> float:
    return min(HIGHEST, loss) if loss is not None and math.isfinite(loss) else HIGHEST


def held(probe: dict[str, Any]) -> float:
    """Mean training loss of the second half of the steps at the full LR."""
    count = round(2 / 3 * probe["steps"])
    return float(np.mean([_finite(loss) for loss in probe["losses"][count // 2 : count]]))


def annealed(probe: dict[str, Any]) -> float:
    """Mean training loss of the last steps, when the LR was nearly down."""
    return float(np.mean([_finite(loss) for loss in probe["losses"][-max(3, probe["steps"] // 4) :]]))


def held_out(probe: dict[str, Any]) -> float:
    """The held-out loss at the end."""
    return _finite(probe["held_out"])


READINGS = {"training loss, LR held": held, "training loss, annealed": annealed, "held-out loss, annealed": held_out}


def chosen(row: dict[str, Any], share: str, read: Callable[[dict[str, Any]], float], margin: float, among: Sequence[str]) -> str:
    """The multiple of the lowest reading, or the peak itself if that is not lower by a `margin` of what its probe gained."""
    probes = row["probes"][share]
    best = min(among, key=lambda m: read(probes[m]))
    start = row["held_out"] if read is held_out else float(np.mean(probes["1"]["losses"][:3]))
    gained = abs(start - read(probes[best]))
    return best if read(probes["1"]) - read(probes[best]) > margin * gained else "1"


def ratio(row: dict[str, Any], multiple: str) -> float:
    """The end with a multiple over that with the peak itself."""
    lower, upper = (max(FLOOR, _finite(row["ends"][m]["test"])) for m in (multiple, "1"))
    return min(CLIP, max(1 / CLIP, lower / upper))


def report(rows: list[dict[str, Any]]) -> str:
    """The table, of geometric means over all runs."""
    lines = ["| read | steps of a probe | margin | test loss | worst | moved |", "|---" * 6 + "|"]

    def line(*cells: str, of: list[str]) -> None:
        ratios = [ratio(row, multiple) for row, multiple in zip(rows, of, strict=True)]
        moved = sum(multiple != "1" for multiple in of)
        lines.append(f"| {' | '.join(cells)} | {geometric_mean(ratios):.3f} | {max(ratios):.2f} | {moved} of {len(rows)} |")

    for among in (("0.5", "1", "2"), ("0.25", "0.5", "1", "2", "4")):
        name = f"of {', '.join(among)}"
        line(f"the best {name}", "", "", of=[min(among, key=lambda m, row=row: ratio(row, m)) for row in rows])
        for share in map("{:g}".format, PROBES):
            for reading, reads in READINGS.items():
                for margin in (0.0, 0.25):
                    of = [chosen(row, share, reads, margin, among) for row in rows]
                    line(f"{reading}, {name}", f"{float(share):.0%}", f"{margin:g}", of=of)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    cases = [c for c in CASES if args.cases is None or any(p in c for p in args.cases)]
    rows, started = read(RESULTS), time.perf_counter()
    done = {(row["case"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for case in cases:
            if (case, seed) not in done and not args.report and time.perf_counter() - started < 60 * args.minutes:
                rows.append(run(case, seed))
                with RESULTS.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(report([row for row in rows if row["seed"] in args.seeds and row["case"] in cases]))


if __name__ == "__main__":
    main()
