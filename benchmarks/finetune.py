"""Fine-tuning: AutoWU beside a grid of LRs, with and without going back, from the default range and from a hundred times lower.

    python benchmarks/finetune.py

A model is trained on one half of its data, then moved to the other:

- ``labels``: a convolutional network (and ``mlp``, a perceptron without normalisation) from the digits 0 to 4 to the digits 5 to
  9, 20 images of each.
- ``lora``: the perceptron, frozen, with adapters of rank 4 beside its layers (Hu et al. 2021) and a new head.
- ``text``: a byte-level transformer from all of Python's standard library to the files of its `asyncio`: continued pre-training.

Each is trained with each LR of a grid under 5 % linear warm-up and cosine, and by AutoWU: ``default`` is AutoWU(optimizer,
total_steps=..., model=model). The report takes the test loss as a ratio to the best of the grid on that seed.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from machine import machine
from peers import cosine
from tasks import CONTEXT, Task, learning_rates, make_optimizer, make_task
from torch import Tensor, nn

from autowu import AutoWU

RESULTS = Path(__file__).parent / "results" / "finetune.jsonl"
CASES = {
    "labels adamw": (16, 200),
    "labels sgd": (16, 200),
    "mlp adamw": (16, 200),
    "mlp sgd": (16, 200),
    "lora adamw": (16, 200),
    "text adamw": (16, 300),
}
"""Batch size and steps."""
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "no rollback": {"rollback": False},
    "lower range": {"min_lr": 1e-6},
    "lower range, no rollback": {"min_lr": 1e-6, "rollback": False},
}
SEEDS = (0, 1)


class Adapted(nn.Module):
    """A frozen linear layer and an adapter beside it."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


def train(
    task: Task, model: nn.Module, optimizer: Any, after_step: Callable[[Tensor], Any], batch: int, steps: int, seed: int
) -> None:
    batches = task.batches(batch, seed)
    for _ in range(steps):
        inputs, targets = next(batches)
        loss = task.loss(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after_step(loss.detach())


@lru_cache
def tasks(kind: str) -> tuple[Task, Task]:
    """What a model is trained on first, and what it is moved to."""
    if kind == "text":
        first = make_task("lm64")
        files = sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))
        held_out = files[::5]
        text = b"".join(path.read_bytes() for path in files if path not in held_out)
        return first, Task(_sequences(text), _sequences(b"".join(path.read_bytes() for path in held_out)), first.new_model)
    all_digits = make_task("cnn" if kind == "labels" else "mlp")
    (x, y), (test_x, test_y) = all_digits.train, all_digits.test
    few = torch.cat([(y == digit).nonzero()[:20, 0] for digit in range(5, 10)])
    first = Task((x[y < 5], y[y < 5]), (test_x[test_y < 5], test_y[test_y < 5]), all_digits.new_model)
    return first, Task((x[few], y[few]), (test_x[test_y >= 5], test_y[test_y >= 5]), all_digits.new_model)


def _sequences(text: bytes) -> tuple[Tensor, Tensor]:
    numbers = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    number = (len(numbers) - 1) // CONTEXT
    return numbers[: number * CONTEXT].view(-1, CONTEXT), numbers[1 : number * CONTEXT + 1].view(-1, CONTEXT)


@lru_cache
def pretrained(kind: str, seed: int) -> nn.Module:
    """The model after its first task."""
    task, _ = tasks(kind)
    torch.manual_seed(seed)
    model, steps = task.new_model(), 600 if kind == "text" else 300
    optimizer = make_optimizer("adamw", model, 3e-3)
    schedule = cosine(optimizer, steps, steps // 20)
    train(task, model, optimizer, lambda loss: schedule.step(), 32, steps, seed)
    return model


def begin(kind: str, seed: int) -> nn.Module:
    """The pre-trained model as it is moved."""
    model = copy.deepcopy(pretrained(kind, seed))
    torch.manual_seed(seed)
    if kind == "lora":
        assert isinstance(model, nn.Sequential)
        *layers, head = model
        adapted = [Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in layers]
        assert isinstance(head, nn.Linear)
        model = nn.Sequential(*adapted, nn.Linear(head.in_features, head.out_features))
    return model


def run(case: str, method: str, lr: float | None, seed: int) -> dict[str, Any]:
    """One run; the line of the results file."""
    kind, opt = case.split()
    batch, steps = CASES[case]
    task, model = tasks(kind)[1], begin(kind, seed)
    optimizer = make_optimizer(opt, model, 1.0 if lr is None else lr)
    facts: dict[str, Any] = {}
    if method == "grid":
        schedule = cosine(optimizer, steps, round(0.05 * steps))
        train(task, model, optimizer, lambda loss: schedule.step(), batch, steps, seed)
    else:
        options = METHODS[method] if "rollback" in METHODS[method] else {"model": model} | METHODS[method]
        scheduler = AutoWU(optimizer, total_steps=steps, **options)
        train(task, model, optimizer, scheduler.step, batch, steps, seed)
        assert scheduler.switch is not None
        facts = {"found_lr": scheduler.switch.lr, "events": [event.kind for event in scheduler.events]}
    loss, accuracy = task.evaluate(model, task.test)
    known = {"case": case, "method": method, "lr": lr, "seed": seed}
    return known | {"test_loss": round(loss, 5) if math.isfinite(loss) else None, "accuracy": round(accuracy, 4)} | facts


def report(rows: list[dict[str, Any]]) -> str:
    """The table: test loss over the best of the grid, the mean over seeds, and the accuracy for losses that are infinite."""
    lines = ["| case | best LR | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for case in CASES:
        best: dict[int, dict[str, Any]] = {}
        for row in rows:
            if row["case"] == case and row["method"] == "grid" and row["test_loss"] is not None:
                best[row["seed"]] = min(best.get(row["seed"], row), row, key=lambda r: r["test_loss"])
        cells = [f"{statistics.geometric_mean(row['lr'] for row in best.values()):.2g}"]
        for method in METHODS:
            ratios = [
                math.inf if row["test_loss"] is None else row["test_loss"] / best[row["seed"]]["test_loss"]
                for row in rows
                if (row["case"], row["method"]) == (case, method)
            ]
            cells.append(f"{statistics.geometric_mean(ratios):.2f}" if all(map(math.isfinite, ratios)) else "inf")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()[1:]] if RESULTS.exists() else []
    if not rows:
        RESULTS.write_text(json.dumps({"machine": machine("cpu")}) + "\n")
    done = {(row["case"], row["method"], row["lr"], row["seed"]) for row in rows}
    for case in CASES:
        for seed in SEEDS:
            wanted = [("grid", lr) for lr in learning_rates(case.split()[1])] + [(method, None) for method in METHODS]
            for method, lr in wanted:
                if (case, method, lr, seed) not in done:
                    rows.append(run(case, method, lr, seed))
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
