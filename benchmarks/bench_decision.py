"""Time of one test and of one step of AutoWU against the number of losses, with both engines in one run.

    python benchmarks/bench_decision.py [--device cuda] [--repeats 9] [--out benchmarks/results/bench_decision.json]

- *One test*: reduce the losses to a curve, fit it, decide. The closed form uses all losses, in at most 2,048 bins; GPyTorch
  (``gp="gpytorch"``) fits 100 and conditions on five draws of 500.
- *One step*: a whole ``scheduler.step(loss)`` that makes no test, with the loss as a tensor: append it, write the next LR. Mean of
  200 calls.

One thread. The engines take turns at every repeat; the table and the file give the medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read once, when NumPy is loaded

import torch
from machine import machine
from torch import Tensor

from autowu import AutoWU, ClosedFormGP, GPyTorchGP
from autowu.gp import LossCurveGP
from autowu.history import LossHistory
from autowu.switching import decide

NUM_LOSSES = (100, 1_000, 10_000, 100_000, 1_000_000)
TESTS_PER_REPEAT = {"closed_form": 20, "gpytorch": 1}
STEPS_PER_SAMPLE = 200


def loss_curve(n: int, device: str) -> Tensor:
    """A warm-up of n noisy losses, lowest at 0.6 of it."""
    x = torch.arange(n, dtype=torch.float64) / n
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (0.9 + 1.4 * ((x - 0.6) / 0.6) ** 2 + 0.1 * noise).float().to(device)


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of a call, the work that it leaves on the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_test(engine: LossCurveGP, history: LossHistory, n: int) -> Callable[[], object]:
    return lambda: decide(engine.posterior(history.curve(n)), 0, confidence=0.95, patience=3, min_contrast=6.0)


def steps(scheduler: AutoWU, losses: list[Tensor]) -> Callable[[], object]:
    def call() -> None:
        for loss in losses:
            scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]  # what optimizer.step() leaves behind
            scheduler.step(loss)

    return call


def scheduler_after(n: int, gp: LossCurveGP, history: LossHistory) -> AutoWU:
    """A scheduler in its warm-up with n losses behind it and no test ahead."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    total = 8 * n + 1_000_000
    scheduler = AutoWU(optimizer, total_steps=total, gp=gp, test_interval=total)
    optimizer.step()
    scheduler._rooms.judge.history = history
    scheduler.last_epoch = n
    return scheduler


def measure(n: int, device: str, repeats: int) -> dict[str, float]:
    """Medians in milliseconds (tests) and microseconds (steps)."""
    losses = loss_curve(n, device)
    engines: dict[str, LossCurveGP] = {"closed_form": ClosedFormGP(), "gpytorch": GPyTorchGP()}
    tests, step_calls = {}, {}
    for name, engine in engines.items():
        history = LossHistory(engine.max_points)
        for loss in losses.unbind():
            history.append(loss)
        tests[name] = one_test(engine, history, n)
        # The steps go on from n losses while the tests stay at n.
        own = LossHistory.from_state_dict(history.state_dict())
        step_calls[name] = steps(scheduler_after(n, engine, own), [losses[k % n] for k in range(STEPS_PER_SAMPLE)])
    samples: dict[str, list[float]] = {f"{kind}_{name}": [] for kind in ("test_ms", "step_us") for name in engines}
    for call in (*tests.values(), *step_calls.values()):
        call()  # once, for all that happens at the first use only
    for _ in range(repeats):
        for name in engines:
            samples[f"test_ms_{name}"] += [1e3 * seconds(tests[name], device) for _ in range(TESTS_PER_REPEAT[name])]
            samples[f"step_us_{name}"].append(1e6 * seconds(step_calls[name], device) / STEPS_PER_SAMPLE)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return medians | {"test_ratio": medians["test_ms_gpytorch"] / medians["test_ms_closed_form"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_decision.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    print(f"{'':>10} | {'one test (ms)':^34} | {'one step, no test (µs)':^24}")
    print(f"{'losses':>10} | {'closed form':>11} {'gpytorch':>10} {'ratio':>11} | {'closed form':>11} {'gpytorch':>12}")
    for n in NUM_LOSSES:
        row = measure(n, args.device, args.repeats)
        rows.append({"losses": n} | {name: round(value, 4) for name, value in row.items()})
        tests = f"{row['test_ms_closed_form']:11.2f} {row['test_ms_gpytorch']:10.1f} {row['test_ratio']:10.0f}x"
        print(f"{n:10,} | {tests} | {row['step_us_closed_form']:11.1f} {row['step_us_gpytorch']:12.1f}", flush=True)

    result = {"machine": machine(args.device), "repeats": args.repeats, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"medians of {args.repeats}, one thread; written to {args.out}")


if __name__ == "__main__":
    main()
