"""What the loop of train.py costs: its images/s over those of a bare loop with the same model, optimizer and batches.

    python benchmarks/bench_train.py [--device cuda] [--repeats 9] [--steps 20] [--out benchmarks/results/bench_train.json]

The bare loop is zero_grad, forward, cross entropy, backward and step. train.py's is that of a run of 90 epochs with its records and
progress; the test after an epoch and the checkpoint are left out. Both are in one process, with one thread on a CPU, and take turns
in blocks of `--steps` steps, each first in every other pair. Medians over the repeats, of the ratios too. The results file is
written after each row, and keeps those of the same machine that are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import nn

from autowu.training.build import Parts, build
from autowu.training.checkpoints import Checkpoints
from autowu.training.config import TrainConfig, parse_args
from autowu.training.console import Console
from autowu.training.data import Loaders, find_data
from autowu.training.folder import RunFolder
from autowu.training.loop import Loop
from autowu.training.process import Process
from autowu.training.progress import Progress
from autowu.training.records import Recorder
from autowu.training.signals import StopSignals

SETTINGS = {
    "cpu": {
        "test_resnet, digits": ["--model", "test_resnet", "--batch-size", "64"],
        "resnet18, 64 pixels": ["--dataset", "synthetic", "--model", "resnet18", "--img-size", "64", "--batch-size", "16"],
    },
    "cuda": {
        "resnet50, amp": ["--dataset", "synthetic", "--model", "resnet50", "--batch-size", "256", "--amp"],
        "vit_small, amp": ["--dataset", "synthetic", "--model", "vit_small_patch16_224", "--batch-size", "256", "--amp"],
    },
}
SCHEDULES = {"autowu": [], "cosine": ["--sched", "cosine"]}


class Block:
    """The first `steps` batches of a loader, as one."""

    def __init__(self, loader: Any, steps: int) -> None:
        self._loader, self._steps = loader, min(steps, len(loader))

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._steps)


def bare(parts: Parts, loader: Block, device: torch.device) -> None:
    """A block of the bare loop."""
    criterion = nn.CrossEntropyLoss()
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        parts.optimizer.zero_grad()
        with parts.autocast():
            loss = criterion(parts.model(images), labels)
        loss.backward()
        parts.optimizer.step()


def looped(config: TrainConfig, process: Process, steps: int, stack: ExitStack) -> Callable[[], object]:
    """What trains a block in the loop of train.py, epoch after epoch."""
    parts, loaders = build(config, process, find_data(config, process))
    folder = RunFolder(config, 1)
    length = len(loaders.train)
    recorder = Recorder(folder, Progress(), length, None)
    console = Console(config, process, parts.model, length, 0)
    signals = StopSignals(process)
    for part in (recorder, console, signals):
        stack.enter_context(part)
    few = Loaders(Block(loaders.train, steps), loaders.test, loaders.sampler)  # type: ignore[arg-type]
    checkpoints = Checkpoints(parts, process, folder, config)
    loop = Loop(config, process, parts, few, checkpoints, recorder, console, signals)
    epochs = itertools.count()
    return lambda: loop.train_epoch(Progress(next(epochs)))


def seconds(act: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, sched: str, device: str, steps: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        options = [*SETTINGS[device][name], *SCHEDULES[sched], "--epochs", "90", "--device", device, "--run-dir", f"{folder}/run"]
        config = parse_args(options)
        process = Process(0, 1, torch.device(device))
        torch.manual_seed(0)
        loop = looped(config, process, steps, stack)
        torch.manual_seed(0)
        parts, loaders = build(config, process, find_data(config, process))
        block = Block(loaders.train, steps)
        kinds = {"bare": lambda: bare(parts, block, process.device), "train": loop}
        for act in kinds.values():
            seconds(act, device)
        times: dict[str, list[float]] = {"bare": [], "train": []}
        for repeat in range(repeats):
            for kind in sorted(kinds, reverse=repeat % 2 == 1):
                times[kind].append(seconds(kinds[kind], device))
    steps = len(block)
    images = steps * config.step_size
    row: dict[str, Any] = {"setting": name, "sched": sched, "batch": config.step_size, "steps": steps, "repeats": repeats}
    row |= {f"{kind}_images_per_s": round(images / statistics.median(of_kind), 1) for kind, of_kind in times.items()}
    ratios = [b / t for b, t in zip(times["bare"], times["train"], strict=True)]
    row |= {"ratio": round(statistics.median(ratios), 4), "ratios": [round(ratio, 4) for ratio in sorted(ratios)]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", nargs="+", help="some of them by name (default: all of the device)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_train.json")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    if args.out.exists() and (before := json.loads(args.out.read_text()))["machine"] == result["machine"]:
        result = before
    for name, sched in itertools.product(args.settings or SETTINGS[args.device], SCHEDULES):
        row = measure(name, sched, args.device, args.steps, args.repeats)
        print(row, flush=True)
        result["rows"] = [one for one in result["rows"] if (one["setting"], one["sched"]) != (name, sched)] + [row]
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
