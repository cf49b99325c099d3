"""Cost of a step of LARS, TVLARS and LAMB beside torch's fused SGD and AdamW, timm's and pytorch_optimizer's.

    pip install -e .[bench]
    python benchmarks/bench_optim.py [--device cuda] [--models resnet50 vit_base_patch16_224] [--rounds 11] [--processes 5]
                                     [--families sgd adam] [--no-compile] [--out benchmarks/results/bench_optim.json]

The parameters of real models with random gradients in float32; norms and biases with neither decay nor adaptation, as
`autowu.optim.param_groups` sorts them. The optimizers of a family (SGD's, Adam's) take turns in every round, from gradients that
were just written anew. The table gives the ratio to the family's fused kernel in the same round: the median over the rounds, of
which the median over several processes, for where the memory lies that a process is given changes its ratios for good.

The limit is the ratio of the bytes that must move. SGD with momentum reads weight, gradient and buffer and writes two of them: 5
times the parameters; LARS reads weight and gradient once more for their norms: 7. AdamW reads four and writes three: 7. LAMB needs
the norm of the update before it can use it: it reads weight, gradient and both moments and writes the moments, then reads weight
and moments and writes the weight: 10. A cache that holds a parameter between the two passes takes it below that.

The results file is written after each family of a model. It keeps the rows of those that are not measured again, if they are of the
same machine and rounds: on a machine that is there for minutes, measure `--models` and `--families` one by one.

On a GPU the table also counts the kernels that a step launches.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import machine
from timm.optim import Lamb, Lars
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from autowu.optim import LAMB, LARS, TVLARS, param_groups

Groups = list[dict[str, Any]]
LIMITS = {"sgd": ("fused SGD", 7 / 5), "adam": ("fused AdamW", 10 / 7)}


def of_pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    """A class of a package that is measured where it is installed."""
    make: Callable[..., Optimizer] = getattr(importlib.import_module("pytorch_optimizer"), name)
    return make


def tensor(lr: float) -> Tensor:
    """An LR that may change without compiling anew."""
    return torch.tensor(lr)


FAMILIES: dict[str, dict[str, Callable[[Groups], Optimizer]]] = {
    "sgd": {
        "torch SGD, fused": lambda groups: SGD(groups, lr=0.1, momentum=0.9, fused=True),
        "torch SGD, foreach": lambda groups: SGD(groups, lr=0.1, momentum=0.9, foreach=True),
        "timm Lars": lambda groups: Lars(groups, lr=0.1, momentum=0.9),
        "pytorch_optimizer LARS": lambda groups: of_pytorch_optimizer("LARS")(groups, lr=0.1, momentum=0.9),
        "LARS": lambda groups: LARS(SGD(groups, lr=0.1, momentum=0.9)),
        "LARS, foreach": lambda groups: LARS(SGD(groups, lr=0.1, momentum=0.9, fused=True), foreach=True),
        "LARS, compiled": lambda groups: LARS(SGD(groups, lr=tensor(0.1), momentum=0.9)),
        "TVLARS": lambda groups: TVLARS(groups, lr=0.1),
        "TVLARS, foreach": lambda groups: TVLARS(groups, lr=0.1, foreach=True),
        "TVLARS, compiled": lambda groups: TVLARS(groups, lr=tensor(0.1)),
    },
    "adam": {
        "torch AdamW, fused": lambda groups: AdamW(groups, lr=1e-3, fused=True),
        "torch AdamW, foreach": lambda groups: AdamW(groups, lr=1e-3, foreach=True),
        "timm Lamb": lambda groups: Lamb(groups, lr=1e-3, max_grad_norm=None),
        "pytorch_optimizer Lamb": lambda groups: of_pytorch_optimizer("Lamb")(groups, lr=1e-3),
        "LAMB": lambda groups: LAMB(groups, lr=1e-3),
        "LAMB, foreach": lambda groups: LAMB(groups, lr=1e-3, foreach=True),
        "LAMB, compiled": lambda groups: LAMB(groups, lr=tensor(1e-3)),
    },
}


def measure(name: str, family: str, device: str, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for every optimizer of a family on the parameters of a model."""
    logging.getLogger("autowu").setLevel(logging.WARNING)
    left_out = ([] if compiled else ["compiled"]) + ([] if importlib.util.find_spec("pytorch_optimizer") else ["pytorch_optimizer"])
    wanted = {key: make for key, make in FAMILIES[family].items() if not any(word in key for word in left_out)}
    steps: dict[str, Callable[[], Any]] = {}
    gradients: list[Tensor] = []
    for key, make in wanted.items():
        torch.manual_seed(0)
        model = timm.create_model(name).to(device)
        parameters = list(model.parameters())
        if not gradients:
            drawn = [1e-3 * torch.randn_like(parameter) for parameter in parameters]
            gradients = [torch.empty_like(gradient) for gradient in drawn]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer = make(param_groups(model, weight_decay=1e-4))
        optimizer.step()  # makes the state
        steps[key] = torch.compile(optimizer.step, fullgraph=True) if "compiled" in key else optimizer.step

    def timed(key: str) -> float:
        torch._foreach_copy_(gradients, drawn)
        wait(device)
        start = time.perf_counter()
        steps[key]()
        wait(device)
        return time.perf_counter() - start

    for key in steps:
        for _ in range(3):
            timed(key)
    times = [{key: timed(key) for key in steps} for _ in range(rounds)]
    first = next(iter(steps))
    return [
        {
            "model": name,
            "family": family,
            "optimizer": key,
            "milliseconds": 1e3 * statistics.median(row[key] for row in times),
            "ratios": [statistics.median(row[key] / row[first] for row in times)],
            "launches": launches(steps[key]) if device == "cuda" else None,
        }
        for key in steps
    ]


def measure_in_processes(processes: int, *args: Any) -> list[dict[str, Any]]:
    """The rows of :func:`measure`, each of medians over several processes, and the ratio in each."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        several = [pool.apply(measure, args) for _ in range(processes)]
    rows = []
    for same in zip(*several, strict=True):
        ratios = [ratio for row in same for ratio in row["ratios"]]
        median = {"milliseconds": statistics.median(row["milliseconds"] for row in same), "ratio": statistics.median(ratios)}
        rows.append(same[0] | median | {"ratios": ratios})
    return rows


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def launches(step: Callable[[], Any]) -> int:
    """Kernels that a step launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or [])


def table(result: dict[str, Any]) -> str:
    """Rows of optimizers, columns of models: the ratio to the fused kernel of the family."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    head = ["optimizer", "over", *models] + (["kernels"] if result["machine"]["device"] != result["machine"]["cpu"] else [])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for family, (base, limit) in LIMITS.items():
        rows = [row for row in result["rows"] if row["family"] == family]
        for key in dict.fromkeys(row["optimizer"] for row in rows):
            own = {row["model"]: row for row in rows if row["optimizer"] == key}
            cells = [f"{own[model]['ratio']:.2f}" if model in own else "" for model in models]
            count = [str(next(iter(own.values()))["launches"])] if "kernels" in head else []
            lines.append("| " + " | ".join([key, base, *cells, *count]) + " |")
        what = "LARS and TVLARS" if family == "sgd" else "LAMB"
        lines.append(
            "| " + " | ".join([f"*limit of {what}*", base, *[f"*{limit:.2f}*"] * len(models), *[""] * ("kernels" in head)]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"])
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=[*FAMILIES])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(args.device), "rounds": args.rounds, "rows": []}
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text())
        if {**before, "rows": []} == result:
            result = before
    print(json.dumps(result["machine"]))
    for model, family in itertools.product(args.models, args.families):
        rows = measure_in_processes(args.processes, model, family, args.device, args.rounds, not args.no_compile)
        result["rows"] = [row for row in result["rows"] if (row["model"], row["family"]) != (model, family)] + rows
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
