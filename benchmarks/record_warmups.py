"""Record full warm-ups without a switch, for decision_quality.py to replay.

    python benchmarks/record_warmups.py [--jobs 2] [--cases "mlp sgd 32 1980" ...] [--seeds 0 1 2 3 4]

Each case of regret.py's CPU suite is trained for 40 % of its steps, while the LR grows exponentially, at an even pace, over
AutoWU's own range: the pace of AutoWU's default after its first quarter. Initial weights and order of the data are those of
regret.py's runs with the same seed. The recording stops at the first loss that is not finite.

A warm-up is a line of JSON in data/recorded.jsonl: case, task, optimizer, batch_size, seed, warmup_steps, min_lr, max_lr and
losses, of five significant digits, null where not finite. Warm-ups that are there already are not recorded again. The file
changes only where a task, an optimizer's settings or an LR range do; remove it then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from regret import CASES, HERE, Case, read  # first: it limits the threads before torch is loaded

# isort: split
import torch
from tasks import make_optimizer, make_task
from torch.optim.lr_scheduler import LambdaLR

from autowu.families import lr_range
from autowu.schedules import warmup_lr

SEEDS = (0, 1, 2, 3, 4)


def record(case: Case, seed: int) -> dict[str, Any]:
    """Train through one warm-up; the line of the file."""
    torch.set_num_threads(1)
    task = make_task(case.task)
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)
    low, high = lr_range(optimizer)
    warmup_steps = int(0.4 * case.steps)
    schedule = LambdaLR(optimizer, lambda step: warmup_lr(step, warmup_steps, low, high))
    batches = task.batches(case.batch_size, seed)
    losses: list[float | None] = []
    while len(losses) < warmup_steps and None not in losses[-1:]:
        inputs, targets = next(batches)
        loss = task.loss(model, inputs, targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        value = loss.item()
        losses.append(float(f"{value:.5g}") if math.isfinite(value) else None)
    return {
        "case": str(case),
        "task": case.task,
        "optimizer": case.optimizer,
        "batch_size": case.batch_size,
        "seed": seed,
        "warmup_steps": warmup_steps,
        "min_lr": low,
        "max_lr": high,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*CASES["cpu"]])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "data" / "recorded.jsonl")
    args = parser.parse_args()
    done = {(curve["case"], curve["seed"]) for curve in read(args.out)}
    left = [(Case.parse(name), seed) for seed in args.seeds for name in args.cases if (name, seed) not in done]
    started = time.perf_counter()
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool, args.out.open("a") as file:
        for count, future in enumerate(as_completed([pool.submit(record, *job) for job in left]), 1):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            if count % 20 == 0 or count == len(left):
                print(f"{count} of {len(left)} warm-ups in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
