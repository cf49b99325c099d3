"""Cost of a scheduler's step: AutoWU beside torch's CosineAnnealingLR and ReduceLROnPlateau.

    python benchmarks/bench_step.py [--device cuda] [--repeats 15] [--out benchmarks/results/bench_step.json]

- *Step*: ``scheduler.step(loss)`` (``step()`` for CosineAnnealingLR) with the loss, noisy and falling, as a tensor on the device,
  the optimizer called before, and no test of AutoWU due; mean of 1,000 calls, for one parameter group and for eight. The floor
  is what ``LRScheduler.step`` itself costs, with LRs that stay as they are.
- *Loop*: a small convolutional network trained for a whole run, AutoWU's tests included; the milliseconds within AutoWU's steps
  above those within CosineAnnealingLR's, and what they leave of the loop's throughput.
- On a GPU the steps also run under ``torch.cuda.set_sync_debug_mode("error")``: one that waits for the device ends the script.

One thread. The schedulers take turns at every repeat; the table and the file give medians over the repeats, of ratios too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read once, when NumPy is loaded

import torch
from machine import machine
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from autowu import AutoWU

CALLS = 1000
TOTAL = 1_000_000
LOOP_STEPS = 1500
LOOP_REPEATS = 5


def optimizer_of(groups: int, device: str) -> torch.optim.SGD:
    params = [torch.zeros(1, device=device, requires_grad=True) for _ in range(groups)]
    for param in params:
        param.grad = torch.zeros_like(param)  # as in training
    return torch.optim.SGD([{"params": [param]} for param in params], lr=0.1)


class Floor(LRScheduler):
    """Does nothing but what torch's own `step` does."""

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def in_warmup(optimizer: torch.optim.Optimizer) -> AutoWU:
    return AutoWU(optimizer, total_steps=TOTAL, test_interval=10 * CALLS)


def in_cooldown(optimizer: torch.optim.Optimizer) -> AutoWU:
    """AutoWU after its switch, which a warm-up of ten steps brings about at its limit."""
    scheduler = AutoWU(optimizer, total_steps=TOTAL, max_warmup_fraction=10 / TOTAL, immediate_cooldown=True)
    for step in range(10):
        optimizer.step()
        scheduler.step(2.0 - step / 10)
    assert scheduler.phase == "cooldown"
    return scheduler


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, TOTAL),
    "floor": Floor,
    "plateau": ReduceLROnPlateau,
    "autowu_warmup": in_warmup,
    "autowu_cooldown": in_cooldown,
}


def step_seconds(name: str, groups: int, device: str) -> float:
    """Mean seconds of a step on the host."""
    optimizer = optimizer_of(groups, device)
    scheduler = SCHEDULERS[name](optimizer)
    generator = torch.Generator().manual_seed(0)
    falling = torch.linspace(1.0, 0.9, CALLS) + 0.01 * torch.randn(CALLS, generator=generator)
    losses = [()] * CALLS if name in ("cosine", "floor") else [(loss,) for loss in falling.to(device)]
    call: Callable[..., object] = scheduler.step
    optimizer.step()
    call(*losses[0])
    strict = device == "cuda" and name.startswith("autowu")
    if strict:
        torch.cuda.set_sync_debug_mode("error")
    total = 0.0
    for loss in losses:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what optimizer.step() leaves behind
        start = time.perf_counter()
        call(*loss)
        total += time.perf_counter() - start
    if strict:
        torch.cuda.set_sync_debug_mode("default")
    return total / CALLS


def loop_seconds(name: str, device: str) -> tuple[float, float]:
    """Seconds of a training run, and of them those within the scheduler's steps, waiting for the device before and after each."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)]
    model = nn.Sequential(*layers).to(device)
    inputs, targets = torch.randn(128, 1, 8, 8, device=device), torch.randint(0, 10, (128,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler: LRScheduler
    if name == "autowu":
        scheduler = AutoWU(optimizer, total_steps=LOOP_STEPS, max_lr=0.1)
    else:
        scheduler = CosineAnnealingLR(optimizer, LOOP_STEPS)

    def step() -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    wait(device)
    within, start = 0.0, time.perf_counter()
    for _ in range(LOOP_STEPS):
        loss = step()
        wait(device)
        before = time.perf_counter()
        if isinstance(scheduler, AutoWU):
            scheduler.step(loss)
        else:
            scheduler.step()
        wait(device)
        within += time.perf_counter() - before
    return time.perf_counter() - start, within


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)

    rows = []
    print(f"{'groups':>6} | {'scheduler':>15} | {'one step (µs)':>13} | over CosineAnnealingLR")
    for groups in (1, 8):
        samples: dict[str, list[float]] = {name: [] for name in SCHEDULERS}
        for name in SCHEDULERS:
            step_seconds(name, groups, args.device)  # once, for all that happens at the first use only
        for _ in range(args.repeats):
            for name, values in samples.items():
                values.append(step_seconds(name, groups, args.device))
        for name, values in samples.items():
            ratio = statistics.median(v / c for v, c in zip(values, samples["cosine"], strict=True))
            step_us = 1e6 * statistics.median(values)
            rows.append({"groups": groups, "scheduler": name, "step_us": round(step_us, 3), "ratio": round(ratio, 3)})
            print(f"{groups:6} | {name:>15} | {step_us:13.2f} | {ratio:.2f}", flush=True)

    loops: dict[str, list[tuple[float, float]]] = {"cosine": [], "autowu": []}
    loop_seconds("cosine", args.device)
    for _ in range(LOOP_REPEATS):
        for name, runs in loops.items():
            runs.append(loop_seconds(name, args.device))
    whole = statistics.median(seconds for seconds, _ in loops["cosine"])
    added = statistics.median(a[1] - c[1] for c, a in zip(loops["cosine"], loops["autowu"], strict=True))
    step_ms, added_ms, throughput = 1e3 * whole / LOOP_STEPS, 1e3 * added, whole / (whole + added)
    print(
        f"loop of {LOOP_STEPS} steps of {step_ms:.2f} ms: {added_ms:.0f} ms more a run, "
        f"{throughput:.4f} of the throughput with CosineAnnealingLR"
    )

    result = {
        "machine": machine(args.device),
        "repeats": args.repeats,
        "rows": rows,
        "loop": {
            "steps": LOOP_STEPS,
            "step_ms": round(step_ms, 4),
            "added_ms": round(added_ms, 2),
            "throughput": round(throughput, 4),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"medians of {args.repeats}, of {LOOP_REPEATS} for the loop, one thread; written to {args.out}")


if __name__ == "__main__":
    main()
