"""Cost of the copy that AutoWU holds, buffers included: time to take, check and put it back, beside a training step; its size.

    python benchmarks/bench_snapshot.py [--device cuda] [--repeats 7] [--out benchmarks/results/bench_snapshot.json]

Models of timm with SGD and momentum or AdamW, batches of random images. On a GPU also with the copy in pinned host memory
(``snapshot_device="cpu"``). One thread on a CPU. Copies and steps take turns; medians over the repeats, of ratios too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import machine
from torch import nn

from autowu.live import LiveRun
from autowu.snapshot import Snapshot

SETTINGS = {
    "cpu": (("test_resnet", "sgd", 128, 32), ("resnet50", "sgd", 8, 64), ("vit_small_patch16_224", "adamw", 2, 224)),
    "cuda": (("resnet50", "sgd", 256, 224), ("vit_base_patch16_224", "adamw", 128, 224)),
}


def seconds(act: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, opt: str, batch: int, size: int, device: str, place: str | None, repeats: int) -> dict[str, Any]:
    model = timm.create_model(name, num_classes=100).to(device)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-4),
    }
    optimizer = kinds[opt](model.parameters())
    side = model.default_cfg["input_size"][1] if "vit" in name else size
    images, labels = torch.randn(batch, 3, side, side, device=device), torch.randint(100, (batch,), device=device)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    # With the model: the call that the README shows. Without it the buffers are left out, a few in a thousand of the bytes.
    snapshot = Snapshot(LiveRun(optimizer, model), None if place is None else torch.device(place))
    snapshot.take(0)
    times: dict[str, list[float]] = {"step": [], "take": [], "sound": [], "restore": []}
    for _ in range(repeats):
        times["step"].append(seconds(step, device))
        times["take"].append(seconds(lambda: snapshot.take(1), device))
        times["sound"].append(seconds(lambda: bool(snapshot.live.sound()), device))
        times["restore"].append(seconds(snapshot.restore, device))
    state = snapshot.state_dict()
    assert state is not None
    row: dict[str, Any] = {"model": name, "optimizer": opt, "batch": batch, "size": side, "held": place or device}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["copy_mib"] = round(sum(t.numel() * t.element_size() for t in state["tensors"].values()) / 2**20, 1)
    row["step_ms"] = round(1000 * statistics.median(times["step"]), 2)
    for what in ("take", "sound", "restore"):
        row[f"{what}_over_step"] = round(statistics.median(t / s for t, s in zip(times[what], times["step"], strict=True)), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_snapshot.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for setting in SETTINGS[args.device]:
        for place in (None, "cpu") if args.device == "cuda" else (None,):
            rows.append(measure(*setting, args.device, place, args.repeats))
            print(rows[-1], flush=True)
    args.out.write_text(json.dumps({"machine": machine(args.device), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
