"""Does a run that is cut and resumed go on bit for bit, whatever the optimizer keeps?

    python benchmarks/resumed.py [--cases SOAP "Sched*"] [--shard 1/2] [--minutes 10]
    python benchmarks/resumed.py --report

The perceptron of tasks.py is trained on the digits by each of the optimizers of the suite `optimizers` of regret.py. The run is cut
in the warm-up, one step before the switch, one after it, and in the cooldown. Model, optimizer, scheduler and random state are
copied, and loaded into new ones. What follows has to have the same LRs and the same losses.

A case is a line of JSON in results/resumed.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from by_case import command
from regret import CASES, Case, default_lr, read
from tasks import make_optimizer, make_task

from autowu import AutoWU

__all__ = ["RESULTS", "read", "report", "run"]

RESULTS = Path(__file__).parent / "results" / "resumed.jsonl"
TRIED = tuple(case for case in CASES["optimizers"] if case.startswith("mlp "))


class Training:
    """One run; it iterates over the LR and the loss of each step."""

    def __init__(self, case: Case, seed: int) -> None:
        self.task, self.case, self.seed = make_task(case.task), case, seed
        torch.manual_seed(seed)
        self.model = self.task.new_model()
        self.optimizer = make_optimizer(case.optimizer, self.model, default_lr(case.optimizer))
        self.scheduler = AutoWU(self.optimizer, total_steps=case.steps, model=self.model)
        self.parts: list[Any] = [self.model, self.optimizer, self.scheduler]

    def steps(self, begin: int = 0) -> Iterator[tuple[float, float]]:
        for inputs, targets in islice(self.task.batches(self.case.batch_size, self.seed), begin, self.case.steps):
            loss = self.task.loss(self.model, inputs, targets)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            lr = float(self.optimizer.param_groups[0]["lr"])
            self.scheduler.step(loss)
            yield lr, float(loss.detach())

    def state(self) -> list[Any]:
        return copy.deepcopy([*(part.state_dict() for part in self.parts), torch.get_rng_state()])

    def load(self, state: list[Any]) -> None:
        *states, random = state
        for part, of_part in zip(self.parts, states, strict=True):
            part.load_state_dict(of_part)
        torch.set_rng_state(random)


def run(name: str, seed: int) -> dict[str, Any]:
    """A run, and the same one cut four times; the line of the results file."""
    case = Case.parse(name)
    whole = Training(case, seed)
    expected = list(whole.steps())
    assert whole.scheduler.switch is not None
    switch, same = whole.scheduler.switch.step, {}
    for cut in (40, switch - 1, switch + 1, 200):
        before, after = Training(case, seed), Training(case, seed)
        list(islice(before.steps(), cut))
        after.load(before.state())
        same[str(cut)] = repr(list(after.steps(cut))) == repr(expected[cut:])
    return {"case": name, "seed": seed, "switch": switch, "same": same}


def report(rows: list[dict[str, Any]]) -> str:
    lines = [f"{row['case']}: not the same after step {cut}" for row in rows for cut, same in row["same"].items() if not same]
    exact = sum(all(row["same"].values()) for row in rows)
    return "\n".join([*lines, f"{exact} of {len(rows)} optimizers go on bit for bit from all four cuts."])


if __name__ == "__main__":
    command(__doc__, RESULTS, TRIED, (0,), run, report)
