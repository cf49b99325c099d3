"""AutoWU.paper against what the published code decided on recorded warm-ups.

Reads a file of warm-ups, one JSON object a line: `losses` (null where not finite) of a model trained while the LR grew
exponentially from `min_lr` to `max_lr` over `warmup_steps` steps, and `published_code`, a list of what the published implementation
of AutoWU decided on them: `steps_per_epoch`, `total_epochs`, `switch_step`, `lr_after_switch`, `by_test`.

A decision agrees if it is made within one epoch of the published one and its LR is within 15 % of it. Prints the curves that
disagree and the share that agrees, of those on which the published code switched by test, and writes
results/paper_decisions.json. The fit draws losses at random, in the published code too, so two runs of the same code disagree on
some curves: compare seeds.

    python benchmarks/paper_decisions.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from autowu import AutoWU
from autowu.phases import Switch

HERE = Path(__file__).parent


def replay(curve: dict[str, Any], run: dict[str, int], seed: int = 0) -> Switch:
    """The switch that AutoWU.paper makes on a recorded warm-up, cut into epochs as in `run`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = AutoWU.paper(
        optimizer, run["steps_per_epoch"], run["total_epochs"], min_lr=curve["min_lr"], max_lr=curve["max_lr"], seed=seed
    )
    optimizer.step()
    losses = [math.nan if loss is None else loss for loss in curve["losses"]]
    losses += [math.nan] * (curve["warmup_steps"] - len(losses))
    for loss in losses:
        scheduler.step(loss)
        if scheduler.switch is not None:
            return scheduler.switch
    raise AssertionError("a warm-up ends with a switch")


def agrees(switch: Switch, run: dict[str, Any]) -> bool:
    """Whether a switch by test is within one epoch and 15 % of LR of the published code's."""
    near_step = abs(switch.step - run["switch_step"]) <= run["steps_per_epoch"]
    near_lr = abs(switch.lr / run["lr_after_switch"] - 1) <= 0.15
    return switch.by_test and near_step and near_lr


def count_agreeing(path: Path, seed: int) -> dict[str, int]:
    """Replay all curves of a file with one seed, and say which decisions disagree."""
    logging.getLogger("autowu").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    curves = [json.loads(line) for line in path.read_text().splitlines()]
    cases = [(curve, run) for curve in curves for run in curve["published_code"] if run["by_test"]]
    agreeing = 0
    for curve, run in cases:
        switch = replay(curve, run, seed)
        agreeing += agrees(switch, run)
        if not agrees(switch, run):
            name = "{task} {optimizer} batch {batch_size} seed {seed} warm-up {warmup_steps}".format(**curve)
            step, lr = f"step {switch.step} for {run['switch_step']}", f"LR {switch.lr:.4g} for {run['lr_after_switch']:.4g}"
            print(f"seed {seed}, {name}: {step}, {lr}", flush=True)
    print(f"seed {seed}: {agreeing} of {len(cases)} agree ({agreeing / len(cases):.0%})", flush=True)
    return {"seed": seed, "agree": agreeing, "of": len(cases)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="?", type=Path, default=HERE / "data" / "warmups.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(count_agreeing, [args.curves] * len(args.seeds), args.seeds))
    (HERE / "results" / "paper_decisions.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
